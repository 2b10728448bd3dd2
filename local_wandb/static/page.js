// Draws one sweep: charts that share their hover, and the table of runs, which is also the legend. Whatever comes from a
// run (names, values, verdicts) goes into the page as text, never as HTML.
"use strict";

// Viridis, as in the report: a rate has the same colour everywhere, by its value on a logarithmic scale. No red: that says
// diverged.
const SPAN = [5e-6, 1e-2];
const STOPS = ["#3b528b", "#33628d", "#2d718e", "#27808e", "#218e8d", "#1e9c89", "#25ab82", "#37b878", "#52c569", "#75d054", "#9bd93c"];
const BAD = "✗";
const U = "Final eval loss against learning rate";
const runs = new Map(); // id -> run, with all points so far
const hidden = new Set(); // ids of runs that are clicked away
let page = null; // the last answer of the server
let sort = { key: "rate", down: false };

const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (text) => (text.length > 40 ? `${text.slice(0, 39)}…` : text);
const plain = (text) => short(String(text)).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // for Plotly
const finite = (points) => points.filter(([, y]) => y !== null);
const last = (run) => finite(run.points[page.final] ?? []).at(-1)?.[1] ?? null;
const best = (run) => finite(run.points[page.final] ?? []).reduce((low, [, y]) => (low === null || y < low ? y : low), null);
const rateText = (rate) => (rate === null ? "no rate" : Number(rate.toPrecision(3)).toExponential());
const number = (value) => (typeof value === "number" ? String(Number(value.toPrecision(5))) : "");

const COLUMNS = [ // key, title, value to sort by, text
  ["name", "Run", (run) => run.name],
  ["rate", "Learning rate", (run) => run.rate, (run) => rateText(run.rate)],
  ["seed", "Seed", (run) => run.seed],
  ["state", "State", (run) => run.state],
  ["step", "Step", (run) => run.step, (run) => (run.steps > 0 ? `${run.step ?? 0} / ${run.steps}` : `${run.step ?? ""}`)],
  ["last", "Last eval loss", last, (run) => number(last(run))],
  ["best", "Best eval loss", best, (run) => number(best(run))],
  ["behavior", "Behavior", (run) => behavior(run)],
];

function behavior(run) {
  const verdict = typeof run.behavior === "object" && run.behavior ? JSON.stringify(run.behavior) : run.behavior;
  return [diverged(run) ? `${BAD} diverged at step ${run.diverged}` : "", verdict].filter(Boolean).join(" · ");
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) key in made ? (made[key] = value) : made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Colours: one per learning rate, tied to its value.

function colours() {
  const rates = [...new Set([...runs.values()].map((run) => run.rate))].sort((a, b) => a - b);
  const [low, high] = SPAN.map(Math.log10);
  return new Map(rates.map((rate) => [rate, rate > 0 ? mix((Math.log10(rate) - low) / (high - low)) : css("--quiet")]));
}

function mix(at) {
  const place = Math.min(1, Math.max(0, at)) * (STOPS.length - 1), from = Math.min(Math.floor(place), STOPS.length - 2);
  const share = place - from, part = (stop, i) => parseInt(STOPS[stop].slice(1 + 2 * i, 3 + 2 * i), 16);
  return `rgb(${[0, 1, 2].map((i) => Math.round(part(from, i) * (1 - share) + part(from + 1, i) * share)).join(",")})`;
}

// An exponential mean that is not pulled towards its start.
function smooth(values, weight) {
  let mean = 0, seen = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean * weight + value * (1 - weight);
    seen = seen * weight + (1 - weight);
    return mean / seen;
  });
}

// Charts

const diverged = (run) => (run.diverged ?? null) !== null;

// The axis shows the runs that did not diverge; the others would press them flat. Null where it shows everything.
function range(column) {
  if ($("logy").checked || !page.charts.find(([name]) => name === column)[2]) return null;
  const shown = [...runs.values()].filter((run) => !hidden.has(run.id));
  const values = shown.filter((run) => !diverged(run)).flatMap((run) => finite(run.points[column]).map((p) => p[1]));
  if (!shown.some(diverged) || values.length === 0) return null;
  const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  return [low - (high - low) * 0.05, high + (high - low) * 0.25];
}

function traces(column, shades) {
  const weight = Number($("smoothing").value), drawn = [];
  for (const run of runs.values()) {
    const points = run.points[column];
    const dense = points.length >= 100; // a mean over a few evaluations would only hide them
    if (hidden.has(run.id) || points.length === 0) continue;
    const x = points.map((p) => p[0]), y = points.map((p) => p[1]), colour = shades.get(run.rate);
    const label = plain(run.rate === null ? run.name : `${rateText(run.rate)}${(run.seed ?? null) === null ? "" : ` seed ${run.seed}`}`);
    const line = { x, y, name: label, mode: dense ? "lines" : "lines+markers", line: { color: colour, width: 2 }, marker: { size: 5 } };
    if (weight > 0 && dense) {
      drawn.push({ ...line, opacity: 0.25, hoverinfo: "skip" });
      drawn.push({ ...line, y: smooth(y, weight) });
    } else drawn.push(line);
    const end = finite(points).at(-1);
    if (diverged(run) && end) drawn.push(cross([run.diverged], [Math.min(end[1], range(column)?.[1] ?? Infinity)], label));
  }
  return drawn;
}

function cross(x, y, label) {
  const marker = { symbol: "x", size: 12, color: css("--bad"), line: { width: 1, color: css("--paper") } };
  return { x, y, mode: "markers", marker, name: label, hoverinfo: "skip", cliponaxis: false };
}

function layout(limits, change = {}) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, hoverformat: ".4~g" };
  const scale = (box) => ({ ...axis, type: $(box).checked ? "log" : "linear" });
  return {
    margin: { l: 48, r: 12, t: 6, b: 34 }, showlegend: false, hovermode: "x", hoverdistance: 30,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12 },
    hoverlabel: { namelength: -1 }, // Plotly would cut through an escape
    xaxis: { ...scale("logx"), title: { text: "step" } },
    yaxis: limits ? { ...scale("logy"), range: limits } : scale("logy"),
    uirevision: `${$("logx").checked}${$("logy").checked}`, // zoom stays while new points come in
    ...change,
  };
}

function frames(charts) { // all of them before the first is drawn: each takes the size of its place in the grid
  for (const [id, title] of charts) {
    if ($(id)) continue;
    const plot = element("div", { id, className: "plot", role: "img" });
    $("charts").append(element("figure", {}, element("figcaption", { textContent: title }), plot));
  }
}

function chart(id, title, drawn, options) {
  const plot = $(id);
  plot.setAttribute("aria-label", `${title}: ${drawn.length} curves; the table below has the values`);
  const first = !plot.data;
  Plotly.react(plot, drawn, options, { displaylogo: false, responsive: true, displayModeBar: false });
  if (first && id !== "chart-rates") link(plot);
}

let hovering = false;
function link(plot) {
  const others = () => [...document.querySelectorAll("#charts .plot")].filter((p) => p !== plot && p.id !== "chart-rates" && p.data?.length);
  const each = (act) => {
    if (hovering) return; // the others answer with events of their own
    hovering = true;
    for (const other of others()) act(other);
    hovering = false;
  };
  plot.on("plotly_hover", (event) => each((other) => Plotly.Fx.hover(other, { xval: event.xvals[0] }, "xy")));
  plot.on("plotly_unhover", () => each((other) => Plotly.Fx.unhover(other)));
}

function drawRates(shades) {
  const ends = [...runs.values()].filter((run) => !hidden.has(run.id) && run.rate > 0);
  const good = ends.filter((run) => last(run) !== null && !diverged(run));
  const lost = ends.filter(diverged);
  const drawn = [{
    x: good.map((run) => run.rate), y: good.map(last), mode: "markers", text: good.map((run) => plain(run.name)),
    marker: { size: 11, color: good.map((run) => shades.get(run.rate)) }, hovertemplate: "%{text}<br>%{x}: %{y}<extra></extra>",
  }];
  // A diverged run has no final loss worth a place on the axis: its cross hangs at the top.
  const top = Math.max(...ends.map((run) => last(run) ?? -Infinity));
  for (const run of lost) drawn.push(cross([run.rate], [Number.isFinite(top) ? top : 1], plain(run.name)));
  const options = layout(null, { hovermode: "closest" });
  options.xaxis = { ...options.xaxis, type: "log", title: { text: "learning rate" }, exponentformat: "power", dtick: 1 };
  chart("chart-rates", U, drawn, options);
}

// Sweeps of several parameters: every run as a line through its values, and how each value goes with the metric.

const ordinal = (values) => [...new Set(values.map(String))].sort();

function ranks(values) { // equal values share their mean rank
  const sorted = [...values].sort((a, b) => a - b);
  return values.map((value) => (sorted.indexOf(value) + sorted.lastIndexOf(value)) / 2);
}

function correlation(x, y) {
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const [mx, my] = [mean(x), mean(y)];
  const sum = (f) => x.reduce((total, _, i) => total + f(x[i] - mx, y[i] - my), 0);
  const scale = Math.sqrt(sum((a) => a * a) * sum((_, b) => b * b));
  return scale ? sum((a, b) => a * b) / scale : null;
}

function explained(labels, y) { // the correlation ratio: the share of the variance that lies between the labels
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length, all = mean(y);
  const total = y.reduce((sum, value) => sum + (value - all) ** 2, 0);
  const between = [...new Set(labels)].reduce((sum, label) => {
    const group = y.filter((_, i) => labels[i] === label);
    return sum + group.length * (mean(group) - all) ** 2;
  }, 0);
  return total ? between / total : null;
}

// One axis of the parallel coordinates: where each value lies between 0 and 1, by its logarithm where that spreads wide.
function axis(name, values) {
  const numeric = values.every((value) => typeof value === "number");
  const log = numeric && values.every((value) => value > 0) && Math.max(...values) / Math.min(...values) > 30;
  const labels = ordinal(values);
  const scaled = values.map((value) => (log ? Math.log10(value) : numeric ? value : labels.indexOf(String(value))));
  const [low, high] = [Math.min(...scaled), Math.max(...scaled)];
  const places = scaled.map((value) => (high > low ? (value - low) / (high - low) : 0.5));
  const texts = values.map((value) => plain(numeric ? number(value) : value));
  const marks = [...new Map(texts.map((text, i) => [text, places[i]]))];
  const ends = [...marks].sort((a, b) => a[1] - b[1]);
  return { name: plain(name), places, texts, marks: marks.length <= 8 ? marks : [ends[0], ends.at(-1)] };
}

function drawParameters() {
  const shown = [...runs.values()].filter((run) => run.value !== null && !hidden.has(run.id)).slice(0, 300);
  $("parameters").hidden = page.parameters.length === 0 || shown.length < 2;
  if ($("parameters").hidden) return;
  const metric = shown.map((run) => run.value);
  const of = (name) => shown.map((run) => run.point[name] ?? null);
  const axes = [...page.parameters.map((name) => axis(name, of(name))), axis(page.metric, metric)];
  const place = axes.at(-1).places, drawn = shown.map((run, i) => ({
    x: axes.map((_, at) => at), y: axes.map((one) => one.places[i]), mode: "lines+markers", line: { color: mix(1 - place[i]), width: 1.5 },
    marker: { size: 5 }, name: plain(run.name), text: axes.map((one) => `${one.name}: ${one.texts[i]}`), hovertemplate: "%{text}",
  }));
  const marks = axes.flatMap((one, at) => one.marks.map(([text, y]) => ({
    x: at, y, text, showarrow: false, xanchor: "left", xshift: 6, font: { size: 11, color: css("--quiet") } })));
  $("parallel").setAttribute("aria-label", `Parallel coordinates of ${shown.length} runs; the table below says how each parameter goes with ${page.metric}`);
  const options = layout(null, { hovermode: "closest", annotations: marks, margin: { l: 20, r: 60, t: 10, b: 30 } });
  options.xaxis = { ...options.xaxis, type: "linear", title: { text: "" }, tickvals: axes.map((_, at) => at), ticktext: axes.map((one) => one.name) };
  options.yaxis = { ...options.yaxis, type: "linear", visible: false, range: [-0.06, 1.06] };
  Plotly.react($("parallel"), drawn, options, { displaylogo: false, responsive: true, displayModeBar: false });
  const rows = page.parameters.map((name) => {
    const values = of(name), numeric = values.every((value) => typeof value === "number");
    const r = numeric ? correlation(ranks(values), ranks(metric)) : null;
    return [name, explained(values.map(String), metric), r];
  }).sort((a, b) => (b[1] ?? 0) - (a[1] ?? 0));
  const head = ["Parameter", `Share of the variance of ${page.metric} between its values (η²)`, "Rank correlation (Spearman)", "n"];
  $("importance").replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col", textContent: text })))),
    element("tbody", {}, ...rows.map(([name, share, r]) => element("tr", {}, element("td", { textContent: name }),
      ...[share, r, shown.length].map((value) => element("td", { className: "number", textContent: value === null ? "" : Number(value.toFixed(2)) }))))));
}

// The table, and the buttons of the rates

function toggle(ids, show) {
  for (const id of ids) show ? hidden.delete(id) : hidden.add(id);
  draw();
}

function eye(label, ids, colour) {
  const shown = ids.some((id) => !hidden.has(id));
  const button = element("button", { type: "button", title: shown ? "Hide" : "Show" });
  button.dataset.key = ids.join(" "); // focus finds its button again after a redraw
  button.setAttribute("aria-pressed", shown);
  const swatch = element("span", { className: "swatch", ariaHidden: "true" });
  swatch.style.background = colour;
  button.append(swatch, label);
  button.onclick = () => toggle(ids, !shown);
  return button;
}

function table(shades) {
  const [, , value] = COLUMNS.find(([key]) => key === sort.key);
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || x === undefined || x === "") return y === null || y === undefined || y === "" ? 0 : 1; // empty cells last
    if (y === null || y === undefined || y === "") return -1;
    return (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y))) * (sort.down ? -1 : 1);
  };
  const head = COLUMNS.map(([key, title]) => {
    const arrow = sort.key === key ? (sort.down ? " ↓" : " ↑") : "";
    const button = element("button", { type: "button", textContent: title + arrow });
    button.dataset.key = `sort ${key}`;
    button.onclick = () => { sort = { key, down: sort.key === key && !sort.down }; draw(); };
    const cell = element("th", { scope: "col" }, button);
    cell.setAttribute("aria-sort", sort.key === key ? (sort.down ? "descending" : "ascending") : "none");
    return cell;
  });
  const body = [...runs.values()].sort(order).map((run) => element("tr", { id: `run-${run.id}` }, ...COLUMNS.map(([key, , get, text]) => {
    if (key === "name") return element("td", {}, eye(run.name, [run.id], shades.get(run.rate)));
    const cell = element("td", { textContent: (text ?? get)(run) ?? "" });
    cell.className = ["rate", "seed", "step", "last", "best"].includes(key) ? "number" : key === "behavior" ? "words" : "";
    const bad = key === "state" ? ["failed", "crashed"].includes(run.state) : key === "behavior" && diverged(run);
    if (bad) cell.classList.add("bad");
    return cell;
  })));
  $("runs").replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

function draw() {
  const focus = document.activeElement?.dataset?.key, shades = colours();
  $("rates").replaceChildren(...[...shades].map(([rate, colour]) =>
    eye(rateText(rate), [...runs.values()].filter((run) => run.rate === rate).map((run) => run.id), colour)));
  frames([...page.charts.map(([column, title]) => [`chart-${column}`, title]), ["chart-rates", U]]);
  $("chart-rates").parentElement.hidden = shades.size < 2; // one rate makes no U
  for (const [column, title] of page.charts) chart(`chart-${column}`, title, traces(column, shades), layout(range(column)));
  drawRates(shades);
  drawParameters();
  table(shades);
  $("alerts").hidden = page.alerts.length === 0;
  $("alerts").querySelector("ul").replaceChildren(
    ...page.alerts.map((alert) => element("li", { textContent: `${alert.run}: ${alert.title}: ${alert.text}` })));
  if (focus) document.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
}

// How long the sweep still takes, by the pace since this page first saw it train; as experiment.py says it.

let since = null;
function left() {
  const live = (run) => ["running", "pending", "preempting"].includes(run.state);
  if (!page.total || !page.runs.some((run) => live(run) && run.step !== null && run.step < run.steps)) return "";
  const again = ["crashed", "preempted"]; // their points are offered again
  const share = (run) => (live(run) ? (run.step ?? 0) / (run.steps || Infinity) : again.includes(run.state) ? 0 : 1);
  const done = page.runs.reduce((sum, run) => sum + share(run), 0), now = performance.now() / 1000;
  since ??= { done, now };
  const gained = done - since.done;
  if (gained < 0.02 * page.total) return "";
  const seconds = Math.max(0, ((now - since.now) * (page.total - done)) / gained);
  return `about ${seconds > 90 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds)} s`} left`;
}

// New points every two seconds while a run is live, every fifteen when none is.

async function update() {
  try {
    const after = JSON.stringify(Object.fromEntries([...runs.values()].map((run) => [run.id, run.last])));
    const answer = await fetch(`${location.pathname}/data`, { method: "POST", body: after });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    page = await answer.json();
    const before = runs.size ? JSON.stringify([...runs.values()].map(({ points, ...rest }) => rest)) : "";
    for (const run of page.runs) {
      const known = runs.get(run.id);
      if (known) for (const column in run.points) run.points[column] = (known.points[column] ?? []).concat(run.points[column]);
      runs.set(run.id, run);
    }
    for (const id of runs.keys()) if (!page.runs.some((run) => run.id === id)) runs.delete(id);
    const now = JSON.stringify([...runs.values()].map(({ points, ...rest }) => rest));
    if (now !== before || !document.querySelector(".plot")) draw();
    const count = (state) => page.runs.filter((run) => run.state === state).length;
    const said = `${page.state.toLowerCase()}: ${page.runs.length} run${page.runs.length === 1 ? "" : "s"}, ${count("running")} running, ${count("finished")} finished`;
    if ($("status").textContent !== said) $("status").textContent = said;
    $("left").textContent = left();
  } catch (error) {
    $("status").textContent = `Waiting for the server: ${error.message}`;
  }
  setTimeout(update, page?.live ?? true ? 2000 : 15000);
}

for (const id of ["smoothing", "logx", "logy"]) $(id).addEventListener("input", () => {
  document.querySelector("output[for=smoothing]").textContent = $("smoothing").value;
  if (page) draw();
});
$("controls").addEventListener("submit", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page && draw());
update();
