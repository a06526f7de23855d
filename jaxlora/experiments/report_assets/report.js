"use strict";
// The report's data: {runs, metrics, columns, common, shown}; see report.py.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLOURS = ["#3b82f6", "#f97316", "#22a45d", "#d6409f", "#8b5cf6", "#eab308", "#06a5b4", "#ef4444", "#7c8a99", "#a16207"];
const DASHES = [[], [8, 4], [2, 3], [10, 4, 2, 4]];
const colour = (run) => COLOURS[run.id % COLOURS.length];
const dash = (run) => DASHES[Math.floor(run.id / COLOURS.length) % DASHES.length];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function told(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(told).join(", ");
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return Math.abs(value) < 1e4 ? String(value) : value.toLocaleString("en");
  const size = Math.abs(value), short = value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
  // Learning rates as a person writes them, 5e-3, and losses as numbers, 0.00789.
  return size < 1e-4 || size >= 1e6 || (size < 1e-2 && short.length <= 6) ? short : String(+value.toPrecision(5));
}

// ---- charts -------------------------------------------------------------------------------------------------------

function smoothed(values, weight) {
  // Exponential, with the bias of its start divided out; what is missing stays so.
  let mean = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

function marks(runs, metric) {
  // Rings at the best evaluation, triangles at spikes.
  return (plot) => {
    const context = plot.ctx, scale = devicePixelRatio;
    runs.forEach((run, index) => {
      const series = plot.series[index + 1];
      if (!series.show) return;
      context.strokeStyle = context.fillStyle = colour(run);
      context.lineWidth = 2 * scale;
      const at = (step) => {
        const place = plot.data[0].indexOf(step);
        const value = place < 0 ? null : plot.data[index + 1][place];
        return value === null || value === undefined ? null : [plot.valToPos(step, "x", true), plot.valToPos(value, "y", true)];
      };
      const best = metric === "eval/nll" && run.best !== null ? at(run.best) : null;
      if (best) { context.beginPath(); context.arc(...best, 5 * scale, 0, 7); context.stroke(); }
      if (metric.startsWith("train/")) for (const step of run.spikes) {
        const spike = at(nearest(plot.data[0], step));
        if (!spike) continue;
        const [x, y] = spike, r = 5 * scale;
        context.beginPath(); context.moveTo(x, y - 3 * r); context.lineTo(x - r, y - 5 * r); context.lineTo(x + r, y - 5 * r); context.fill();
      }
    });
  };
}

function nearest(sorted, wanted) {
  return sorted.reduce((best, step) => Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best, sorted[0]);
}

function axes(horizontal, vertical) {
  const common = { stroke: css("--dim"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
  const values = (_, splits) => splits.map((v) => v === null ? "" : told(+v.toPrecision(6)));
  return [{ ...common, label: horizontal, labelSize: 20, values }, { ...common, label: vertical, labelSize: 20, size: 56, values }];
}

function drawCurves(place, runs, metric, { logarithmic = false, smooth = 0, height = 340 } = {}) {
  place.chart?.destroy();
  place.chart = null;
  place.textContent = "";
  const there = runs.filter((run) => run.curves[metric]?.[0].length);
  if (!there.length) { place.append(element("p", { className: "hint", textContent: runs.length ? `No chosen run has ${metric}.` : "Choose runs below." })); return; }
  const tables = there.map((run) => {
    const [steps, values] = run.curves[metric];
    let shown = metric.startsWith("train/") && smooth ? smoothed(values, smooth) : values;
    if (logarithmic) shown = shown.map((value) => value > 0 ? value : null);
    return [steps, shown];
  });
  const points = Math.max(...tables.map((table) => table[0].length)) <= 40;
  place.chart = new uPlot({
    width: place.clientWidth, height, scales: { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } },
    series: [{ label: "step" }, ...there.map((run) => ({ label: run.name, stroke: colour(run), dash: dash(run), width: 2, spanGaps: true, points: { show: points, size: 5, fill: colour(run) }, value: (_, value) => told(value) }))],
    axes: axes("step", metric), cursor: { drag: { x: true, y: false } }, legend: { show: there.length <= 12 }, hooks: { draw: [marks(there, metric)] },
  }, uPlot.join(tables), place);
}

function drawScatter(place, key) {
  place.chart?.destroy();
  place.chart = null;
  place.textContent = "";
  const dots = data.runs.filter((run) => typeof run.config[key] === "number" && run.row.best_eval_nll !== null)
    .sort((a, b) => a.config[key] - b.config[key]);
  if (!dots.length) { place.append(element("p", { className: "hint", textContent: "No setting with numbers differs among runs with evaluations." })); return; }
  // One series a model and rank; several runs at one value each keep a place of their own.
  const groups = [...new Set(dots.map((run) => run.group))];
  const x = dots.map((run) => run.config[key]);
  const series = groups.map((group) => dots.map((run) => run.group === group ? run.row.best_eval_nll : null));
  const wide = x[0] > 0 && x[x.length - 1] / x[0] >= 10;
  const levels = dots.map((run) => run.row.best_eval_nll), least = Math.min(...levels);
  const tall = least > 0 && Math.max(...levels) / least >= 30;
  const round = (_, splits) => splits.map((value) => value !== null && Math.abs(value / +value.toPrecision(2) - 1) < 1e-9 ? told(+value.toPrecision(2)) : "");
  const [across, up] = axes(key, "lowest eval/nll");
  const pad = (_, low, high) => wide ? [low / 1.5, high * 1.5] : low === high ? [low - 1, high + 1] : [low - (high - low) * 0.05, high + (high - low) * 0.05];
  place.chart = new uPlot({
    width: place.clientWidth, height: 280, scales: { x: { time: false, distr: wide ? 3 : 1, range: pad }, y: { distr: tall ? 3 : 1 } },
    series: [{ label: key, value: (_, value) => told(value) }, ...groups.map((group, index) => ({ label: group, stroke: COLOURS[index % COLOURS.length], paths: () => null, points: { show: true, size: 9, fill: COLOURS[index % COLOURS.length] }, value: (_, value) => told(value) }))],
    axes: [wide ? { ...across, values: round } : across, up], cursor: { drag: { x: false, y: false } }, legend: { show: groups.length <= 8 },
  }, [x, ...series], place);
}

// ---- curves -------------------------------------------------------------------------------------------------------

const chosen = new Set(data.shown);
const state = () => ({ logarithmic: $("logy").checked, smooth: +$("smooth").value, height: innerWidth < 700 ? 280 : 380 });
const redraw = () => drawCurves($("chart"), data.runs.filter((run) => chosen.has(run.id)), $("metric").value, state());

for (const metric of data.metrics) $("metric").append(element("option", { textContent: metric }));
for (const run of data.runs) {
  const dot = element("i");
  dot.style.background = colour(run);
  const chip = element("button", { className: "chip", title: run.group }, dot, run.name);
  chip.setAttribute("aria-pressed", chosen.has(run.id));
  chip.onclick = () => {
    chosen.has(run.id) ? chosen.delete(run.id) : chosen.add(run.id);
    chip.setAttribute("aria-pressed", chosen.has(run.id));
    redraw();
  };
  run.chip = chip;
  $("chips").append(chip);
}
for (const id of ["metric", "logy", "smooth"]) $(id).addEventListener("input", redraw);
$("none").onclick = () => { chosen.clear(); for (const run of data.runs) run.chip.setAttribute("aria-pressed", false); redraw(); };
$("find").oninput = () => {
  const wanted = $("find").value.toLowerCase();
  for (const run of data.runs) run.chip.hidden = !`${run.name} ${run.group}`.toLowerCase().includes(wanted);
};

for (const key of data.swept) $("setting").append(element("option", { textContent: key }));
$("setting").oninput = () => drawScatter($("scatter"), $("setting").value);

// ---- table --------------------------------------------------------------------------------------------------------

const body = document.querySelector("#table tbody");
const heads = document.querySelector("#table thead tr");
const numeric = new Set(data.columns.filter((name) => data.runs.some((run) => typeof run.row[name] === "number")));
const rows = data.runs.map((run) => {
  const line = element("tr");
  for (const name of data.columns) {
    const value = run.row[name];
    const cell = element("td", { className: numeric.has(name) ? "n" : "", title: typeof value === "string" && value.length > 20 ? value : "" });
    name === "run" ? cell.append(element("a", { href: `#run-${run.id}`, textContent: value, onclick: () => open(run.id) })) : cell.append(told(value));
    line.append(cell);
  }
  body.append(line);
  return { run, line, words: Object.values(run.row).join(" ").toLowerCase() };
});
function sortBy(name, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of heads.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = (a, b) => {
    const [one, two] = [a.run.row[name], b.run.row[name]];
    const missing = (value) => value === null || value === undefined || value === "";
    if (missing(one) || missing(two)) return missing(one) - missing(two); // what is missing comes last, either way
    const sign = typeof one === "number" && typeof two === "number" ? one - two : String(one).localeCompare(String(two), "en", { numeric: true });
    return down ? -sign : sign;
  };
  body.append(...[...rows].sort(order).map((row) => row.line));
}
for (const name of data.columns) {
  const head = element("th", { className: numeric.has(name) ? "n" : "", textContent: name.replaceAll("_", " "), tabIndex: 0 });
  head.onclick = () => sortBy(name, head);
  head.onkeydown = (event) => { if (event.key === "Enter") sortBy(name, head); };
  heads.append(head);
}
$("filter").oninput = () => {
  const wanted = $("filter").value.toLowerCase().split(/\s+/);
  for (const row of rows) row.line.hidden = !wanted.every((word) => row.words.includes(word));
};

// ---- details of a run ---------------------------------------------------------------------------------------------

function open(id) {
  $(`run-${id}`).open = true;
}

function pairs(entries) {
  const list = element("div", { className: "pairs" });
  for (const [name, value] of entries) list.append(element("div", {}, element("span", { textContent: name }), element("span", { textContent: told(value) })));
  return list;
}

function texts(title, examples) {
  const rows = examples.map((one) => element("tr", {}, element("td", { className: "n", textContent: (one.change > 0 ? "+" : "") + told(one.change) }), element("td", { textContent: one.prompt || `example ${one.example}` }), element("td", { textContent: one.reference })));
  const head = element("thead", {}, element("tr", {}, ...["nll", "prompt", "wanted"].map((text) => element("th", { textContent: text }))));
  return [element("h4", { textContent: title }), element("table", { className: "texts" }, head, element("tbody", {}, ...rows))];
}

function fill(details) {
  const run = data.runs[+details.dataset.run], more = details.querySelector(".more");
  if (more.childElementCount) return;
  const baseline = run.baseline === null ? null : data.runs[run.baseline];
  const both = baseline ? [run, baseline] : [run];
  for (const metric of ["eval/nll", "train/nll"]) if (run.curves[metric]) {
    const place = element("div", { className: "chart" });
    more.append(element("h4", { textContent: metric + (baseline ? `, with the baseline ${baseline.name}` : "") }), place);
    drawCurves(place, both, metric, { height: 220 });
  }
  const numbers = run.findings.flatMap((finding) => Object.entries(finding.numbers).map(([name, value]) => [`${finding.kind}: ${name.replaceAll("_", " ")}`, value]));
  if (numbers.length) more.append(element("h4", { textContent: "Numbers behind the verdict" }), pairs(numbers));
  if (run.examples) {
    if (run.examples.better.length) more.append(...texts(`Held-out examples that got better than with ${baseline.name}`, run.examples.better));
    if (run.examples.worse.length) more.append(...texts(`Held-out examples that got worse than with ${baseline.name}`, run.examples.worse));
  }
  more.append(element("h4", { textContent: "Facts" }), pairs(Object.entries(run.facts)));
  const settings = { ...data.common, ...run.config };
  const differs = (key) => baseline && key in run.config && JSON.stringify(run.config[key]) !== JSON.stringify(baseline.config[key]);
  const names = Object.keys(settings).sort();
  const changed = names.filter(differs), rest = names.filter((key) => !differs(key));
  if (changed.length) more.append(element("h4", { textContent: `Settings that differ from ${baseline.name}'s` }), pairs(changed.map((key) => [key, `${told(settings[key])} (${told({ ...data.common, ...baseline.config }[key]) || "not set"})`])));
  if (rest.length) more.append(element("details", { className: "rest" }, element("summary", { textContent: `${changed.length ? "all other" : "all"} settings` }), pairs(rest.map((key) => [key, settings[key]]))));
}
for (const details of document.querySelectorAll("details.run")) details.addEventListener("toggle", () => { if (details.open) fill(details); });
const openTarget = () => { const place = location.hash.startsWith("#run-") && document.querySelector(location.hash); if (place) place.open = true; };
addEventListener("hashchange", openTarget);

// ---- at first, and when the window or the colours change ----------------------------------------------------------

function drawAll() {
  redraw();
  drawScatter($("scatter"), $("setting").value);
}
let waiting;
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; clearTimeout(waiting); waiting = setTimeout(drawAll, 150); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawAll(); for (const more of document.querySelectorAll("details.run .more")) more.textContent = ""; for (const details of document.querySelectorAll("details.run[open]")) fill(details); });
drawAll();
openTarget();
