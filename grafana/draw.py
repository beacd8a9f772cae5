"""Draws a dashboard as a person would see it, from what Prometheus says: `draw.py BOARD ANSWERS PICTURE`.

BOARD is one of the dashboards beside this file. ANSWERS is what Prometheus' API gave for each target of each panel and for each annotation
(`tests/e2e/watching.rs` asks and writes it). PICTURE is an SVG. It is a likeness: places, titles, queries, units, mappings, thresholds and
stacking are the dashboard's, the figures are Prometheus', but the hand is not Grafana's, which Debian does not have. What it cannot draw
is an error, so that a panel is never left out in silence.
"""

import json
import math
import re
import sys
from html import escape

WIDTH, ROW, GAP, TOP = 1280, 40, 8, 34
BACKGROUND, PANEL, EDGE, TEXT, DIM, GRID = "#111217", "#181b1f", "#2c3035", "#d8d9da", "#9a9ca3", "#2a2d33"
NAMED = {"green": "#56a64b", "yellow": "#e0b400", "red": "#e02f44", "blue": "#3274d9", "orange": "#ff780a", "text": TEXT}
# As Grafana's classic palette begins.
PALETTE = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#c8f2c2", "#fade2a", "#ffa6b0"]
STEPS = [1, 2, 2.5, 5, 10]


def scaled(value, names, base=1000):
    size = 0
    while abs(value) >= base and size < len(names) - 1:
        value, size = value / base, size + 1
    return f"{short(value)} {names[size]}".strip()


def short(value):
    """Three digits, without zeros that say nothing."""
    if value == int(value):
        return str(int(value))
    text = f"{value:.{max(0, 2 - int(math.floor(math.log10(abs(value)))))}f}" if abs(value) >= 0.01 else f"{value:.2g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value):
    if value < 0.001:
        return "0 s" if value == 0 else f"{short(value * 1e6)} µs"
    if value < 1:
        return f"{short(value * 1000)} ms"
    if value < 120:
        return f"{short(value)} s"
    return f"{int(value) // 60}:{round(value) % 60:02} min" if value < 7200 else f"{short(value / 3600)} h"


def duration(value):
    if not math.isfinite(value):
        return "∞"
    value = round(value)
    parts = [f"{value // size % of}{unit}" for size, of, unit in ((3600, 10**6, "h"), (60, 60, "m")) if value >= size]
    return " ".join(parts + [f"{value % 60}s"])


UNITS = {
    "short": lambda value: scaled(value, ["", "K", "M", "G"]),
    "s": seconds,
    "dtdurations": duration,
    "bps": lambda value: scaled(value, ["b/s", "kb/s", "Mb/s", "Gb/s"]),
    "Bps": lambda value: scaled(value, ["B/s", "kB/s", "MB/s", "GB/s"]),
    "decbytes": lambda value: scaled(value, ["B", "kB", "MB", "GB"]),
    "percentunit": lambda value: f"{short(round(value * 100, 1))} %",
}


class Picture:
    def __init__(self):
        self.parts = []

    def rect(self, x, y, w, h, fill, **more):
        self.add("rect", x=x, y=y, width=max(w, 0), height=max(h, 0), fill=fill, **more)

    def line(self, x1, y1, x2, y2, stroke, **more):
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, **more)

    def text(self, x, y, text, size=13, fill=TEXT, anchor="start", weight="normal"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">'
            f"{escape(text)}</text>"
        )

    def add(self, name, **attributes):
        told = (f'{key.replace("_", "-")}="{n:.1f}"' if isinstance(n, float) else f'{key.replace("_", "-")}="{n}"' for key, n in attributes.items())
        self.parts.append(f"<{name} {' '.join(told)}/>")


def width_of(text, size, bold=False):
    """At most: the fonts of browsers differ."""
    return len(text) * size * (0.66 if bold else 0.57)


def fitting(text, size, width):
    """A text, shortened if it is wider than there is room."""
    room = int(width / (size * 0.57))
    return text if len(text) <= room else text[: max(room - 1, 1)] + "…"


def in_two(text):
    """Two lines, about as long as each other."""
    gaps = [at for at, letter in enumerate(text) if letter == " "]
    middle = min(gaps, key=lambda at: abs(at - len(text) / 2))
    return [text[:middle], text[middle + 1 :]]


class Series:
    def __init__(self, target, result):
        labels = result["metric"]
        self.name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), target["legendFormat"])
        values = result["values"] if "values" in result else [result["value"]]
        self.points = [(float(at), float(value)) for at, value in values]

    def last(self):
        known = [value for _, value in self.points if not math.isnan(value)]
        return known[-1] if known else None


class Panel:
    def __init__(self, board_panel, said):
        self.panel = board_panel
        self.defaults = board_panel["fieldConfig"]["defaults"]
        self.custom = self.defaults.get("custom") or {}
        self.format = UNITS[self.defaults["unit"]]
        self.series = [
            Series(target, result)
            for target, results in zip(board_panel["targets"], said["targets"], strict=True)
            for result in results
        ]
        assert not board_panel["fieldConfig"]["overrides"], board_panel["title"]
        place = board_panel["gridPos"]
        unit = (WIDTH - GAP) / 24
        self.x, self.y = GAP + place["x"] * unit, TOP + GAP + place["y"] * ROW
        self.w, self.h = place["w"] * unit - GAP, place["h"] * ROW - GAP

    def mapped(self, value):
        """Text and colour that the panel gives to a value of its own."""
        for mapping in self.defaults.get("mappings", []):
            assert mapping["type"] == "value", mapping
            found = mapping["options"].get(short(value))
            if found:
                return found["text"], found.get("color")
        return None, None

    def say(self, value):
        if value is None:
            return self.defaults.get("noValue", "no data")
        return self.mapped(value)[0] or self.format(value)

    def color(self, value):
        mapped = value is not None and self.mapped(value)[1]
        if mapped:
            return NAMED[mapped]
        color = self.defaults["color"]
        if color["mode"] == "fixed":
            return NAMED[color["fixedColor"]]
        steps = self.defaults["thresholds"]["steps"]
        reached = [step for step in steps if step["value"] is None or value is not None and value >= step["value"]]
        return NAMED[reached[-1]["color"]]

    def draw(self, picture, span, marks):
        picture.rect(self.x, self.y, self.w, self.h, PANEL, rx=3, stroke=EDGE)
        size = 13.5
        title = self.panel["title"]
        lines = [title] if width_of(title, size, True) < self.w - 12 else in_two(title)
        for i, line in enumerate(lines):
            picture.text(self.x + 9, self.y + 20 + 16 * i, line, size, weight="600")
        self.head = 14 + 16 * len(lines)
        {
            "stat": self.stat,
            "bargauge": self.bars,
            "timeseries": self.lines,
            "state-timeline": self.states,
        }[self.panel["type"]](picture, span, marks)

    def stat(self, picture, _span, _marks):
        shown = self.series or [None]
        y, h = self.y + self.head, self.h - self.head - 6
        w = (self.w - 12) / len(shown)
        filled = self.panel["options"]["colorMode"] == "background"
        for i, series in enumerate(shown):
            x = self.x + 6 + i * w
            value = series and series.last()
            color = self.color(value) if value is not None else DIM
            if filled:
                picture.rect(x + 2, y, w - 4, h, color if value is not None else EDGE, rx=3)
            text = self.say(value)
            named = len(shown) > 1
            room = w - 16
            size = min(34.0, h * 0.42, room / max(len(text), 2) / 0.72)
            middle = y + h * (0.46 if named else 0.55) + size * 0.32
            fill = "#ffffff" if filled else color
            picture.text(x + w / 2, middle, text, round(size, 1), fill, "middle", "600")
            if named:
                picture.text(x + w / 2, y + h - 8, series.name, round(min(12, 12 * (w - 8) / width_of(series.name, 12)), 1), "#ffffff" if filled else DIM, "middle")

    def bars(self, picture, _span, _marks):
        if not self.series:
            picture.text(self.x + self.w / 2, self.y + self.h / 2, self.say(None), 14, DIM, "middle")
            return
        top, room = self.y + self.head + 2, self.h - self.head - 10
        step = room / len(self.series)
        size = min(12.5, step * 0.8)
        names = min(max(width_of(series.name, size) for series in self.series) + 8, self.w * 0.55)
        values = max(width_of(self.say(series.last()), size) for series in self.series) + 12
        left, width = self.x + 10 + names, self.w - 20 - names - values
        most = max([series.last() or 0 for series in self.series] + [1e-9])
        for i, series in enumerate(self.series):
            y, value = top + i * step, series.last()
            picture.text(left - 8, y + step / 2 + size * 0.35, fitting(series.name, size, names), round(size, 1), anchor="end")
            height = min(step * 0.7, 26)
            picture.rect(left, y + (step - height) / 2, width, height, "#22252b")
            picture.rect(left, y + (step - height) / 2, width * max(value or 0, 0) / most, height, self.color(value))
            picture.text(self.x + self.w - 10, y + step / 2 + size * 0.35, self.say(value), round(size, 1), self.color(value), "end", "600")

    def states(self, picture, span, _marks):
        names = max(width_of(series.name, 12.5) for series in self.series) + 10
        left, right, top, bottom = self.x + 10 + names, self.x + self.w - 12, self.y + 34, self.y + self.h - 26
        step = (bottom - top) / len(self.series)
        at = time_scale(span, left, right)
        for i, series in enumerate(self.series):
            y, height = top + i * step + step * 0.1, step * 0.8
            picture.text(left - 8, y + height / 2 + 4, series.name, 12.5, anchor="end")
            runs = []
            for moment, value in series.points:
                if runs and runs[-1][2] == value:
                    runs[-1][1] = moment
                else:
                    if runs:
                        runs[-1][1] = moment
                    runs.append([moment, moment, value])
            for begun, ended, value in runs:
                picture.rect(at(begun), y, at(ended) - at(begun), height, self.color(value), fill_opacity=0.85)
                text = self.say(value)
                if width_of(text, 12.5) + 12 < at(ended) - at(begun):
                    picture.text(at(begun) + 7, y + height / 2 + 4, text, 12.5, "#ffffff")
        clock(picture, span, at, bottom + 16)

    def lines(self, picture, span, marks):
        legend = self.legend()
        left, right = self.x + 70, self.x + self.w - 14
        top, bottom = self.y + 34, self.y + self.h - 26 - 17 * len(legend)
        at = time_scale(span, left, right)
        stacked = self.custom["stacking"]["mode"] == "normal"
        drawn = self.stacked() if stacked else [(series, [(t, v, 0.0) for t, v in series.points]) for series in self.series]
        values = [v for _, points in drawn for _, v, _ in points if math.isfinite(v)]
        most = max(values + [self.defaults.get("min") or 0]) or 1
        tick = nice(most / 4)
        most = tick * math.ceil(round(most / tick, 6))
        for i in range(round(most / tick) + 1):
            y = bottom - (bottom - top) * i * tick / most
            picture.line(left, y, right, y, GRID)
            picture.text(left - 6, y + 4, self.format(i * tick), 11.5, DIM, "end")
        height = lambda value: bottom - (bottom - top) * min(max(value / most, 0), 1)
        clock(picture, span, at, bottom + 16)
        for mark, color in marks:
            picture.line(at(mark), top, at(mark), bottom, color, stroke_dasharray="4 3", stroke_width=1.2)
        if self.custom["thresholdsStyle"]["mode"] == "dashed":
            for step in self.defaults["thresholds"]["steps"]:
                if step["value"] is not None and 0 < step["value"] < most:
                    picture.line(left, height(step["value"]), right, height(step["value"]), NAMED[step["color"]], stroke_dasharray="7 5")
        for i, (series, points) in reversed(list(enumerate(drawn))):
            color = PALETTE[i % len(PALETTE)]
            for run in runs_of(points, span):
                if self.custom["lineInterpolation"] == "stepAfter":
                    run = [point for a, b in zip(run, run[1:] + run[-1:]) for point in (a, (b[0], a[1], a[2]))]
                upper = " ".join(f"{at(t):.1f},{height(v):.1f}" for t, v, _ in run)
                lower = " ".join(f"{at(t):.1f},{height(b):.1f}" for t, _, b in reversed(run))
                if self.custom["fillOpacity"]:
                    picture.add("polygon", points=f"{upper} {lower}", fill=color, fill_opacity=self.custom["fillOpacity"] / 100)
                picture.add("polyline", points=upper, fill="none", stroke=color, stroke_width=self.custom["lineWidth"] * 0.9)
        for row, names in enumerate(legend):
            x = left - 40
            for i, name in names:
                y = self.y + self.h - 10 - 17 * (len(legend) - 1 - row)
                picture.rect(x, y - 5, 14, 4, PALETTE[i % len(PALETTE)])
                picture.text(x + 19, y, name, 12, DIM)
                x += 36 + width_of(name, 12)

    def legend(self):
        rows, x = [[]], 0
        for i, series in enumerate(self.series):
            w = 36 + width_of(series.name, 12)
            if rows[-1] and x + w > self.w - 44:
                rows.append([])
                x = 0
            rows[-1].append((i, series.name))
            x += w
        return rows

    def stacked(self):
        """Each series on top of those before it."""
        below, drawn = {}, []
        for series in self.series:
            points = []
            for t, v in series.points:
                base = below.get(t, 0.0)
                top = base + (0 if math.isnan(v) else v)
                points.append((t, top, base))
                below[t] = top
            drawn.append((series, points))
        return drawn


def runs_of(points, span):
    """The pieces of a line: where Prometheus gave nothing, there is a gap."""
    runs, gap = [], 3 * (span[1] - span[0]) / 200
    for point in points:
        if not math.isfinite(point[1]):
            runs.append([])
        elif runs and runs[-1] and point[0] - runs[-1][-1][0] <= gap:
            runs[-1].append(point)
        else:
            runs.append([point])
    return [run for run in runs if run]


def nice(step):
    size = 10 ** math.floor(math.log10(step))
    return next(size * of for of in STEPS if size * of >= step * 0.999)


def time_scale(span, left, right):
    return lambda t: left + (right - left) * (t - span[0]) / (span[1] - span[0])


def clock(picture, span, at, y):
    """Minutes since the run began: when it was does not matter to anybody."""
    length = span[1] - span[0]
    step = next(step for step in (15, 30, 60, 120, 300, 600, 3600) if length / step <= 8 or step == 3600)
    for i in range(int(length / step) + 1):
        moment = i * step
        picture.text(at(span[0] + moment), y, f"{moment // 60}:{moment % 60:02}", 11.5, DIM, "middle")


def main():
    board_file, answers_file, picture_file = sys.argv[1:]
    with open(board_file, encoding="utf-8") as opened:
        board = json.load(opened)
    with open(answers_file, encoding="utf-8") as opened:
        answers = json.load(opened)
    span = (answers["from"], answers["to"])
    marks = []
    for annotation, results in zip(board["annotations"]["list"], answers["annotations"], strict=True):
        for result in results:
            # It lasts for as long as the query looks back: the beginning is when it happened.
            last = -math.inf
            for at, _ in result["values"]:
                if float(at) - last > 60:
                    marks.append((float(at), NAMED[annotation["iconColor"]]))
                last = float(at)
    said = {panel["id"]: panel for panel in answers["panels"]}
    panels = [Panel(panel, said[panel["id"]]) for panel in board["panels"] if panel["type"] != "row"]
    picture = Picture()
    height = max(panel.y + panel.h for panel in panels) + GAP
    picture.rect(0, 0, WIDTH, height, BACKGROUND)
    picture.text(GAP + 4, 25, board["title"], 17, weight="600")
    length = f"{int(span[1] - span[0]) // 60} min {int(span[1] - span[0]) % 60} s of a run"
    picture.text(WIDTH - GAP - 4, 25, f"{length}; red and green dashes: users were told of a split, and of its end", 12.5, DIM, "end")
    for panel in panels:
        # What a browser shows of it when asked.
        picture.parts.append(f"<g><title>{escape(panel.panel['title'])} {escape(panel.panel['description'])}</title>")
        panel.draw(picture, span, marks)
        picture.parts.append("</g>")
    with open(picture_file, "w", encoding="utf-8") as opened:
        opened.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" '
            f'font-family="Inter, Roboto, \'Helvetica Neue\', Arial, \'DejaVu Sans\', sans-serif">\n' + "\n".join(picture.parts) + "\n</svg>\n"
        )


main()
