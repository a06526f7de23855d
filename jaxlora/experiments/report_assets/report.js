// The report's data: {runs, metrics, columns, common, shown}; see report.py.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLOURS = ["#3b82f6", "#f97316", "#22a45d", "#d6409f", "#8b5cf6", "#eab308", "#06a5b4", "#ef4444", "#7c8a99", "#a16207"];
const DASHES = [[], [8, 4], [2, 3], [10, 4, 2, 4]];
const colour = (run) => COLOURS[run.id % COLOURS.length];
const dash = (run) => DASHES[Math.floor(run.id / COLOURS.length) % DASHES.length];

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

function hint(place, text) {
  place.watcher?.disconnect();
  place.replaceChildren(element("p", { className: "hint", textContent: text }));
}

// One run's curve, with a ring at its best evaluation and triangles at its spikes.
function curve(run, metric, logarithmic, smooth, dots) {
  const [steps, values] = run.curves[metric];
  let shown = metric.startsWith("train/") && smooth ? smoothed(values, smooth) : values;
  if (logarithmic) shown = shown.map((value) => value > 0 ? value : null);
  const points = steps.map((step, index) => [step, shown[index]]);
  const near = (step) => points.reduce((best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
  const marked = (some) => some.map(near).filter(([, value]) => value !== null);
  return {
    name: run.name, colour: colour(run), dash: dash(run), line: true, dots: dots ? 2.5 : 0, values: points,
    rings: metric === "eval/nll" && run.best !== null ? marked([run.best]) : [],
    spikes: metric.startsWith("train/") ? marked(run.spikes) : [],
  };
}

function drawCurves(place, runs, metric, { logarithmic = false, smooth = 0, height = 340 } = {}) {
  const there = runs.filter((run) => run.curves[metric]?.[0].length);
  if (!there.length) return hint(place, runs.length ? `No chosen run has ${metric}.` : "Choose runs below.");
  const dots = Math.max(...there.map((run) => run.curves[metric][0].length)) <= 40;
  const series = there.map((run) => curve(run, metric, logarithmic, smooth, dots)).filter((one) => one.values.some(([, value]) => value !== null));
  if (!series.length) return hint(place, `Nothing of ${metric} can be shown on this scale.`);
  drawChart(place, { x: { label: "step" }, y: { label: metric, logarithmic }, series, height, legend: series.length <= 12, zoom: true });
}

function drawScatter(place, key) {
  const dots = data.runs.filter((run) => typeof run.config[key] === "number" && run.row.best_eval_nll !== null);
  if (!dots.length) return hint(place, "No setting with numbers differs among runs with evaluations.");
  const spread = (values, factor) => Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= factor;
  const groups = [...new Set(dots.map((run) => run.group))];
  const series = groups.map((group, index) => ({
    name: group, colour: COLOURS[index % COLOURS.length], dash: [], line: false, dots: 4.5, rings: [], spikes: [],
    values: dots.filter((run) => run.group === group).map((run) => [run.config[key], run.row.best_eval_nll]),
  }));
  const x = { label: key, logarithmic: spread(dots.map((run) => run.config[key]), 10), room: 0.05 };
  const y = { label: "lowest eval/nll", logarithmic: spread(dots.map((run) => run.row.best_eval_nll), 30) };
  drawChart(place, { x, y, series, height: 280, legend: groups.length <= 8, zoom: false });
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

// ---- at first -----------------------------------------------------------------------------------------------------

redraw();
drawScatter($("scatter"), $("setting").value);
openTarget();
