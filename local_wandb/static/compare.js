// The runs of a project: search, filter, group, choose columns, sort, and draw one metric of the chosen runs. The server
// does the choosing and answers a page at a time, so a thousand runs are as quick as ten. What comes from a run goes
// into the page as text, never as HTML.
"use strict";

const PALETTE = ["#2f6fde", "#d69500", "#1a9e8f", "#8a4fc7", "#c2557a", "#5b8c2a", "#a0632d", "#3aa0d8", "#7a7f8a", "#b0a000"];
const FIXED = [ // key for the order, title, text
  ["display_name", "Run", null],
  ["state", "State", (run) => run.state],
  ["sweep", "Sweep", (run) => run.sweep ?? ""],
  ["created_at", "Created", (run) => new Date(run.created * 1000).toLocaleString()],
];
const FIRST = 6; // columns of values that are shown before anyone has chosen
const chosen = new Map(); // id of a run that is drawn -> its colour
let columns = null; // keys of the columns that are shown; null: the first few
let order = "-created_at", from = 0, last = null, timer = null;

const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const plain = (text) => String(text).slice(0, 40).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // Plotly
const number = (value) => (typeof value === "number" ? String(Number(value.toPrecision(5))) : String(value ?? ""));
const title = (key) => key.replace(/^(config|summary_metrics)\./, "");

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) key in made ? (made[key] = value) : made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shownColumns() {
  return columns ?? last?.keys.slice(0, FIRST) ?? [];
}

function options(select, values) { // keeps what is chosen, also while no run of this page has it
  const kept = select.value, fixed = select.options[0];
  const all = values.includes(kept) || kept === fixed.value ? values : [kept, ...values];
  if (all.join("\n") === [...select.options].slice(1).map((one) => one.value).join("\n")) return;
  select.replaceChildren(fixed, ...all.map((value) => element("option", { value, textContent: title(value) })));
  select.value = kept;
}

// The table

function header(keys, sortable) {
  const cells = [...FIXED.map(([key, text]) => [key, text]), ...keys.map((key) => [key, title(key)])].map(([key, text]) => {
    const down = order === `-${key}`, up = order === `+${key}`;
    const button = element("button", { type: "button", textContent: text + (down ? " ↓" : up ? " ↑" : ""), title: key });
    button.dataset.key = `sort ${key}`;
    button.onclick = () => { order = down ? `+${key}` : `-${key}`; from = 0; ask(); };
    const cell = element("th", { scope: "col" }, sortable ? button : text);
    cell.setAttribute("aria-sort", down ? "descending" : up ? "ascending" : "none");
    return cell;
  });
  return element("tr", {}, ...cells);
}

function row(run, keys) {
  const box = element("input", { type: "checkbox", checked: chosen.has(run.id) });
  box.setAttribute("aria-label", `Draw ${run.name}`);
  box.dataset.key = `draw ${run.id}`;
  box.onchange = () => { choose(run.id, box.checked); ask(); };
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = chosen.get(run.id) ?? "transparent";
  const link = element("a", { href: `${base()}/runs/${encodeURIComponent(run.id)}`, textContent: run.name });
  const cells = FIXED.slice(1).map(([, , text]) => element("td", { textContent: text(run) }));
  if (["failed", "crashed"].includes(run.state)) cells[0].className = "bad";
  const values = keys.map((key) => element("td", { className: typeof run.values[key] === "number" ? "number" : "", textContent: number(run.values[key]).slice(0, 60) }));
  return element("tr", { id: `run-${run.id}` }, element("td", {}, element("span", { className: "run" }, box, swatch, link)), ...cells, ...values);
}

function groupRow(group, keys) {
  const cells = keys.map((key) => {
    const found = group.numbers[key];
    const spread = found?.sd === null || !found ? "" : ` ± ${number(found.sd)}`;
    return element("td", { className: "number", textContent: found ? `${number(found.mean)}${spread} (n=${found.n})` : "" });
  });
  return element("tr", {}, element("td", { textContent: group.value || "(none)" }), element("td", { className: "number", textContent: group.runs }), ...cells);
}

function table() {
  const keys = shownColumns();
  if (last.groups) {
    const head = ["Group: " + title($("group").value), "Runs", ...keys.map((key) => `${title(key)}, mean ± sd`)];
    $("runs").replaceChildren(
      element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col", textContent: text })))),
      element("tbody", {}, ...last.groups.map((group) => groupRow(group, keys))));
    return;
  }
  $("runs").replaceChildren(element("thead", {}, header(keys, true)), element("tbody", {}, ...last.runs.map((run) => row(run, keys))));
}

function boxes() {
  const all = [...new Set([...(columns ?? []), ...last.keys])], keys = shownColumns();
  const text = all.join("\n") + keys.join("\n");
  if ($("columns").dataset.drawn === text) return;
  $("columns").dataset.drawn = text;
  $("columns").querySelector(".boxes").replaceChildren(...all.map((key) => {
    const box = element("input", { type: "checkbox", checked: keys.includes(key) });
    box.dataset.key = `column ${key}`;
    box.onchange = () => { columns = all.filter((one) => (one === key ? box.checked : keys.includes(one))); ask(); };
    return element("label", {}, box, key);
  }));
}

function pages() {
  const move = (text, to) => {
    const button = element("button", { type: "button", textContent: text, disabled: to < 0 || to >= last.found });
    button.dataset.key = text;
    button.onclick = () => { from = to; ask(); };
    return button;
  };
  const end = Math.min(last.from + last.page, last.found);
  $("pages").replaceChildren(...(last.found > last.page
    ? [move("← previous page", from - last.page), ` ${last.from + 1}–${end} of ${last.found} `, move("next page →", from + last.page)] : []));
}

// The chart

function choose(id, draw) {
  const free = PALETTE.find((colour) => ![...chosen.values()].includes(colour)) ?? PALETTE[chosen.size % PALETTE.length];
  draw ? chosen.set(id, free) : chosen.delete(id);
}

function chart() {
  const plot = $("chart");
  plot.hidden = !last.curves;
  if (!last.curves) return;
  const drawn = last.curves.map((curve) => ({
    x: curve.points.map((p) => p[0]), y: curve.points.map((p) => p[1]), name: plain(curve.name),
    mode: curve.points.length > 100 ? "lines" : "lines+markers", line: { color: chosen.get(curve.id), width: 2 }, marker: { size: 5 },
  }));
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, hoverformat: ".4~g" };
  const scale = (box) => ({ ...axis, type: $(box).checked ? "log" : "linear" });
  plot.setAttribute("aria-label", `${$("metric").value}: ${drawn.length} curves; the table below has the values`);
  Plotly.react(plot, drawn, {
    margin: { l: 48, r: 12, t: 6, b: 34 }, showlegend: false, hovermode: "x", paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12 }, hoverlabel: { namelength: -1 },
    xaxis: { ...scale("logx"), title: { text: plain($("x").value) } }, yaxis: { ...scale("logy"), title: { text: plain($("metric").value) } },
    uirevision: `${$("metric").value}${$("x").value}${$("logx").checked}${$("logy").checked}`,
  }, { displaylogo: false, responsive: true, displayModeBar: false });
}

// What is asked and answered

const base = () => location.pathname.split("/").slice(0, 3).join("/");

function wanted() {
  const text = $("filter").value.trim();
  let filter = {};
  try {
    filter = text ? JSON.parse(text) : {};
    $("filter").setAttribute("aria-invalid", "false");
  } catch (error) {
    $("filter").setAttribute("aria-invalid", "true");
    throw new Error(`the filter is not JSON: ${error.message}`);
  }
  const drawn = { metric: $("metric").value, x: $("x").value, runs: [...chosen.keys()] };
  return { search: $("search").value, filter, order, from, group: $("group").value, columns: shownColumns(), chart: drawn };
}

let asked = 0;
async function ask() {
  clearTimeout(timer);
  const mine = ++asked;
  try {
    const answer = await fetch(`${base()}/runs/compare`, { method: "POST", body: JSON.stringify(wanted()) });
    const found = await answer.json();
    if (mine !== asked) return; // another question has been asked since
    if (!answer.ok) throw new Error(found.errors?.[0]?.message ?? `the server answered ${answer.status}`);
    const first = last === null;
    last = found;
    if (first) {
      for (const run of last.runs.filter((one) => Object.keys(one.values).length).slice(0, 5)) choose(run.id, true);
      options($("metric"), last.metrics);
      $("metric").value = ["eval/loss", "train/loss", "loss"].find((name) => last.metrics.includes(name)) ?? last.metrics[0] ?? "";
      if (last.metrics.length) return ask();
    }
    draw();
  } catch (error) {
    if (mine === asked) $("status").textContent = error.message;
  }
  if (mine === asked) timer = setTimeout(ask, last?.live ? 5000 : 30000);
}

function draw() {
  const focus = document.activeElement?.dataset?.key;
  options($("group"), ["state", "group", "sweep", ...last.keys]);
  options($("metric"), last.metrics);
  options($("x"), last.metrics);
  boxes();
  table();
  pages();
  chart();
  const what = last.groups ? `${last.found} groups` : `${last.found} of ${last.total} runs`;
  if ($("status").textContent !== what) $("status").textContent = what;
  if (focus) document.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
}

let typing = null;
for (const id of ["search", "filter"]) $(id).addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => { from = 0; ask(); }, 250);
});
for (const id of ["group", "metric", "x"]) $(id).addEventListener("change", () => { from = 0; ask(); });
for (const id of ["logx", "logy"]) $(id).addEventListener("input", () => last && chart());
$("filters").addEventListener("submit", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => last && chart());
ask();
