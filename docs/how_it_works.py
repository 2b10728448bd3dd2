"""Draws docs/how-it-works.svg:  python docs/how_it_works.py"""

from html import escape
from pathlib import Path

LANES = {"files": 110, "programs": 440, "server": 830}  # and where each one's middle is
WIDTH, HEIGHT, ROW, BOX = 980, 46, 78, {"files": 180, "programs": 280, "server": 240}
# Each stop: its number, lane and row, what it is, and where.
STOPS = (
    (1, "files", 0, "learning_rate: 2.0e-4", "sweep.yaml"),
    (1, "programs", 0, "read", "sweep.py"),
    (2, "programs", 1, "create", "sweep.py"),
    (2, "server", 1, "upsert_sweep", "local_wandb/sweeps.py"),
    (3, "programs", 2, "Sweep.claim", "gang/agent.py"),
    (3, "server", 2, "agent_heartbeat", "local_wandb/sweeps.py"),
    (4, "programs", 3, "parse", "settings.py"),
    (5, "programs", 4, "Member.rate", "gang/member.py"),
    (6, "programs", 5, "Stack.update", "gang/stack.py"),
    (7, "programs", 6, "Member.log_step", "gang/member.py"),
    (7, "server", 6, "stream", "local_wandb/runs.py"),
    (8, "programs", 7, "pull", "analysis/pull.py"),
    (8, "files", 7, "every row", "lr_0.0002/run_data.json"),
    (9, "programs", 8, "build", "analysis/study.py"),
    (10, "programs", 9, "results", "analysis/results.py"),
    (10, "files", 9, "rates[1]", "all_results.json"),
    (11, "programs", 10, "render", "analysis/report.py"),
    (11, "files", 11, "“… use 2e-4 …”", "README.md"),
)
# From stop to stop, as places in STOPS, and what goes along.
FLOWS = (
    (0, 1, ""),
    (1, 2, ""),
    (2, 3, "wandb sweep"),
    (3, 5, ""),
    (5, 4, "the next point"),
    (4, 6, "--learning_rate=0.0002"),
    (6, 7, "training.learning_rate"),
    (7, 8, "the rate of this step"),
    (8, 9, "loss, gradient norm"),
    (9, 10, "a row a step"),
    (10, 11, "every row, once"),
    (11, 12, ""),
    (12, 13, ""),
    (13, 14, "classes, differences"),
    (14, 15, ""),
    (15, 16, ""),
    (16, 17, ""),
)
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .where { font-size: 11px; fill: #59636e }
.flow { font-size: 11px; fill: #0b62c4 } .lane { font-size: 12px; font-weight: 600; fill: #59636e }
.number { font-size: 11px; font-weight: 600; fill: #fff } .page { fill: #fff } .band { fill: #f6f8fa }
rect.stop { fill: #fff; stroke: #8c959f } path { stroke: #0b62c4; stroke-width: 1.5; fill: none }
"""


def place(stop: tuple) -> tuple[float, float, float]:
    """Middle and half the width of a stop's box."""
    _, lane, row, *_ = stop
    return LANES[lane], 66 + ROW * row, BOX[lane] / 2


def box(stop: tuple) -> str:
    number, _, _, what, where = stop
    x, y, half = place(stop)
    return (
        f'<rect class="stop" x="{x - half}" y="{y - HEIGHT / 2}" width="{2 * half}" height="{HEIGHT}" rx="6"/>'
        f'<circle cx="{x - half}" cy="{y}" r="10" fill="#0b62c4"/>'
        f'<text class="number" x="{x - half}" y="{y + 4}" text-anchor="middle">{number}</text>'
        f'<text x="{x}" y="{y - 3}" text-anchor="middle">{escape(what)}</text>'
        f'<text class="where" x="{x}" y="{y + 14}" text-anchor="middle">{escape(where)}</text>'
    )


def flow(start: tuple, end: tuple, words: str) -> str:
    (x1, y1, half1), (x2, y2, half2) = place(start), place(end)
    if x1 == x2:  # downwards
        path, label = f"M{x1} {y1 + HEIGHT / 2} V{y2 - HEIGHT / 2}", (x1 + 8, (y1 + y2) / 2 + 4, "start")
    else:  # across, first down where the end is lower
        side = 1 if x2 > x1 else -1
        to_x = x2 - side * (half2 + (10 if side > 0 else 0))  # a box's number is on its left
        start_x = x1 + side * half1 if y1 == y2 else x1
        path = f"M{start_x} {y1} H{to_x}" if y1 == y2 else f"M{x1} {y1 + HEIGHT / 2} V{y2} H{to_x}"
        label = (start_x + to_x) / 2, y2 - 6, "middle"
    x, y, anchor = label
    return (
        f'<path d="{path}" marker-end="url(#head)"/>'
        f'<text class="flow" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def drawing() -> str:
    height = 66 + ROW * max(stop[2] for stop in STOPS) + 44
    lanes = "".join(
        f'<rect class="band" x="{x - BOX[name] / 2 - 18}" y="6" width="{BOX[name] + 36}" height="{height - 12}"/>'
        f'<text class="lane" x="{x}" y="28" text-anchor="middle">{name}</text>'
        for name, x in LANES.items()
    )
    head = '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    head += '<path d="M1 1 L7 4 L1 7" /></marker>'
    parts = [flow(STOPS[a], STOPS[b], words) for a, b, words in FLOWS] + [box(stop) for stop in STOPS]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">\n'
        f'<style>{STYLE}</style><defs>{head}</defs><rect class="page" width="{WIDTH}" height="{height}"/>{lanes}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("how-it-works.svg").write_text(drawing(), encoding="utf-8")
