"use strict";
// Line and dot charts as SVG. Colours of axes and text come from the style sheet, so the dark mode needs no redrawing.

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Where values stand between two edges, in pixels; logarithmic where asked.
function scaled([low, high], logarithmic, from, to) {
  const by = logarithmic ? Math.log10 : (value) => value;
  const [first, last] = [by(low), by(high)];
  return {
    at: (value) => from + (to - from) * (by(value) - first) / (last - first),
    back: (pixel) => {
      const value = first + (last - first) * (pixel - from) / (to - from);
      return logarithmic ? 10 ** value : value;
    },
  };
}

// Round values within a range: steps of 1, 2 or 5; or powers of ten, with 2 and 5 between where there are few.
function ticks([low, high], logarithmic, most) {
  const found = [];
  if (logarithmic && high / low >= 5) {
    const decades = Math.log10(high / low);
    const between = decades < 3 ? [1, 2, 5] : [1];
    const stride = Math.max(1, Math.ceil(decades / most));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += stride)
      for (const factor of between) {
        const value = +(factor * 10 ** power).toPrecision(6);
        if (value >= low && value <= high) found.push(value);
      }
    return found;
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

// The least and the greatest of some values, with a little room; a single value gets room to stand in.
function reach(values, logarithmic, room) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (logarithmic) {
    const part = low === high ? 2 : (high / low) ** room;
    return [low / part, high * part];
  }
  const part = low === high ? Math.abs(low) / 2 || 1 : (high - low) * room;
  return [low - part, high + part];
}

/* Draws a chart into `place`, anew whenever its width changes.
   x, y: {label, logarithmic}; x.room: share of the range that is left free at both ends.
   series: [{name, colour, dash, line, dots, values: [[x, y or null], ...], rings: [[x, y], ...], spikes: likewise}]
   legend: whether names and the values under the pointer are listed. zoom: whether a part of x may be enlarged. */
function drawChart(place, { x, y, series, height, legend, zoom }) {
  let part = null; // [from, to] of x, when enlarged
  place.watcher?.disconnect();
  const entries = series.map((one) => {
    const swatch = element("i"), value = element("b");
    swatch.style.background = one.colour;
    return { line: element("span", {}, swatch, one.name, value), value };
  });
  const where = element("b");
  const names = element("div", { className: "legend" }, element("span", {}, x.label, where), ...entries.map((entry) => entry.line));

  function draw() {
    const width = place.clientWidth;
    if (!width) return; // not shown yet
    const edges = { left: 58, right: width - 12, top: 10, bottom: height - 42 };
    const all = series.flatMap((one) => one.values);
    const across = part ?? reach(all.map(([at]) => at), x.logarithmic, x.room ?? 0);
    const inside = all.filter(([at, value]) => value !== null && at >= across[0] && at <= across[1]);
    const up = reach((inside.length ? inside : all.filter(([, value]) => value !== null)).map(([, value]) => value), y.logarithmic, 0.05);
    const [h, v] = [scaled(across, x.logarithmic, edges.left, edges.right), scaled(up, y.logarithmic, edges.bottom, edges.top)];
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${y.label} by ${x.label}` });

    for (const value of ticks(across, x.logarithmic, width < 500 ? 4 : 8)) {
      picture.append(svg("line", { class: "grid", x1: h.at(value), x2: h.at(value), y1: edges.top, y2: edges.bottom }));
      picture.append(svg("text", { x: h.at(value), y: edges.bottom + 15, "text-anchor": "middle" }, told(value)));
    }
    for (const value of ticks(up, y.logarithmic, 6)) {
      picture.append(svg("line", { class: "grid", x1: edges.left, x2: edges.right, y1: v.at(value), y2: v.at(value) }));
      picture.append(svg("text", { x: edges.left - 6, y: v.at(value) + 4, "text-anchor": "end" }, told(value)));
    }
    const middle = (edges.top + edges.bottom) / 2;
    picture.append(svg("text", { class: "label", x: (edges.left + edges.right) / 2, y: height - 6, "text-anchor": "middle" }, x.label));
    picture.append(svg("text", { class: "label", x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, y.label));

    // What lies outside an enlarged part is cut off at the frame, marks and all.
    const frame = svg("svg", { x: edges.left - 6, y: 0, width: edges.right - edges.left + 12, height: edges.bottom + 6 });
    frame.setAttribute("viewBox", `${edges.left - 6} 0 ${edges.right - edges.left + 12} ${edges.bottom + 6}`);
    for (const one of series) {
      const paint = { stroke: one.colour, fill: one.colour };
      if (one.line) {
        let path = "", pen = "M";
        for (const [at, value] of one.values) {
          if (value === null) pen = "M"; // a gap
          else { path += `${pen}${h.at(at).toFixed(1)} ${v.at(value).toFixed(1)}`; pen = "L"; }
        }
        frame.append(svg("path", { d: path, fill: "none", stroke: one.colour, "stroke-width": 2, "stroke-dasharray": one.dash.join(" "), "stroke-linejoin": "round" }));
      }
      if (one.dots) for (const [at, value] of one.values) if (value !== null) frame.append(svg("circle", { cx: h.at(at), cy: v.at(value), r: one.dots, ...paint }));
      for (const [at, value] of one.rings) frame.append(svg("circle", { cx: h.at(at), cy: v.at(value), r: 5, fill: "none", stroke: one.colour, "stroke-width": 2 }));
      for (const [at, value] of one.spikes) {
        const [px, py] = [h.at(at), Math.max(v.at(value) - 6, edges.top + 8)];
        frame.append(svg("path", { d: `M${px} ${py}L${px - 5} ${py - 9}L${px + 5} ${py - 9}Z`, ...paint }));
      }
    }
    const cursor = svg("line", { class: "cursor", y1: edges.top, y2: edges.bottom, visibility: "hidden" });
    const chosen = svg("rect", { class: "chosen", y: edges.top, height: edges.bottom - edges.top, width: 0 });
    picture.append(frame, chosen, cursor);

    // ---- the pointer: values under it, and a part to enlarge
    let began = null;
    const pixel = (event) => Math.min(Math.max(event.clientX - picture.getBoundingClientRect().left, edges.left), edges.right);
    picture.onpointermove = (event) => {
      const at = pixel(event), wanted = h.back(at);
      for (const [name, value] of [["x1", at], ["x2", at], ["visibility", "visible"]]) cursor.setAttribute(name, value);
      where.textContent = told(+wanted.toPrecision(3));
      series.forEach((one, index) => { entries[index].value.textContent = told(closest(one.values, wanted)); });
      if (began !== null) { chosen.setAttribute("x", Math.min(began, at)); chosen.setAttribute("width", Math.abs(at - began)); }
    };
    picture.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); for (const entry of entries) entry.value.textContent = ""; where.textContent = ""; };
    if (zoom) {
      picture.onpointerdown = (event) => { if (event.pointerType === "mouse") { began = pixel(event); picture.setPointerCapture(event.pointerId); event.preventDefault(); } };
      picture.onpointerup = (event) => {
        const ends = [began, pixel(event)];
        began = null;
        if (ends[0] === null || Math.abs(ends[1] - ends[0]) < 8) { chosen.setAttribute("width", 0); return; }
        part = ends.map(h.back).sort((a, b) => a - b);
        draw();
      };
      picture.ondblclick = () => { part = null; draw(); };
    }
    place.replaceChildren(picture, ...(legend ? [names] : []));
  }

  let width = place.clientWidth;
  place.watcher = new ResizeObserver(() => { if (place.clientWidth !== width) { width = place.clientWidth; draw(); } });
  place.watcher.observe(place);
  draw();
}

// The value of the point whose x is nearest.
function closest(values, wanted) {
  let best = null;
  for (const [at, value] of values) if (value !== null && (best === null || Math.abs(at - wanted) < Math.abs(best[0] - wanted))) best = [at, value];
  return best && best[1];
}
