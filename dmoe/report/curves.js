/* Charts of curves over steps, tokens or time: lines, held-out points, stacked areas, events. */
const STROKES = ["", "7 4", "2 3", "7 3 2 3", "11 4", "11 3 2 3"];
const GLYPHS = { alert: "M-4 -4 L4 4 M-4 4 L4 -4", skip: "M0 -5 L5 0 L0 5 L-5 0 Z", restart: "M0 -5 L5 4 L-5 4 Z", rollback: "M5 -5 L5 5 L-5 0 Z" };
const GLYPH_NAMES = { alert: "alert", skip: "skipped step", restart: "restart", rollback: "rollback" };
const FROM_ZERO = ["share", "tokens", "experts", "tokens/s", "bytes", "bytes per step", "s per step"];
const NUM_COLOURS = 7;
const NUM_DEPTHS = 6;
const MAX_LABELLED = 10;
const MANY_POINTS = 400;

function curveColour(curve) {
  if (curve.depth === undefined) return `var(--curve-${curve.colour % NUM_COLOURS})`;
  const place = curve.depth * (NUM_DEPTHS - 1);
  const low = Math.min(Math.floor(place), NUM_DEPTHS - 2);
  return `color-mix(in srgb, var(--depth-${low}) ${100 * (1 - (place - low))}%, var(--depth-${low + 1}))`;
}

/* The values of the horizontal axis that the reader has chosen. */
function xAxis(choice, axes) {
  if (choice === "tokens") return { key: "tokens", unit: "tokens", title: "training tokens", log: false };
  if (choice === "time") return { key: "seconds", unit: "seconds", title: "time of training", log: false };
  return { key: "x", unit: "step", title: choice === "log steps" ? "step (log scale)" : axes.x, log: choice === "log steps" };
}

function drawCurves(figure, chart, view, options, hidden, width) {
  const plot = figure.querySelector(".plot");
  const unit = view.y ?? chart.axes.y;
  const axis = xAxis(options.x, chart.axes);
  const shown = view.curves.filter((curve) => !hidden.has(curve.name)).map((curve) => ({ ...curve, at: axis.log ? curve.x.map((step) => Math.max(1, step)) : curve[axis.key] }));
  const stacked = view.stack ? stack(shown) : shown;
  const [low, high] = yRange(stacked, view, unit, options.range !== "all" && chart.options.includes("range"));
  const xs = stacked.flatMap((curve) => curve.at).filter((value) => value !== null);
  const first = axis.log ? Math.min(...xs) : 0;
  const last = Math.max(axis.log ? 2 : 1e-9, ...xs);
  const height = figure.closest("#overview") ? 330 : 270;
  const yTicks = ticks(low, high, height / 60);
  const left = 30 + Math.max(...yTicks.map((value) => widthOf(formatValue(value, unit))), 14);
  const box = { left, right: width - 12, top: 12, bottom: height - 42 };
  const share = axis.log ? (value) => Math.log(value / first) / Math.log(last / first) : (value) => (value - first) / (last - first || 1);
  const toX = (value) => box.left + share(value) * (box.right - box.left);
  const toY = (value) => box.bottom - ((value - low) / (high - low || 1)) * (box.bottom - box.top);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "drawn" });
  const wanted = (box.right - box.left) / 85;
  const xTicks = axis.log ? logTicks(first, last, wanted) : ticks(first, last, wanted);
  drawAxes(root, box, xTicks.map((value) => [toX(value), formatValue(value, axis.unit)]), yTicks.map((value) => [toY(value), formatValue(value, unit)]), { x: axis.title, y: unit === "share" ? "" : unit });
  const clip = `${figure.id}-clip`;
  root.append(svg("clipPath", { id: clip }, svg("rect", { x: box.left - 5, y: box.top - 6, width: box.right - box.left + 10, height: box.bottom - box.top + 8 })));
  const lines = svg("g", { "clip-path": `url(#${clip})` });
  if (!hidden.has("events")) drawEvents(lines, view.marks, axis, toX, box, hidden);
  for (const curve of stacked) drawCurve(lines, curve, view, toX, toY);
  root.append(lines);
  const cross = svg("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const target = svg("rect", { class: "target", x: box.left, y: box.top, width: Math.max(0, box.right - box.left), height: box.bottom - box.top });
  root.append(cross, target);
  plot.replaceChildren(root);
  const places = [...new Set(xs)].sort((a, b) => a - b);
  onHover(target, plot, (x, y) => {
    const nearest = places.reduce((best, value) => (Math.abs(toX(value) - x) < Math.abs(toX(best) - x) ? value : best), places[0]);
    for (const end of ["x1", "x2"]) cross.setAttribute(end, toX(nearest));
    cross.setAttribute("visibility", "visible");
    showLabel(plot, toX(nearest), y, [[null, `${axis.unit === "step" ? "step " : ""}${formatValue(nearest, axis.unit)}`], ...labelsAt(shown, nearest, unit, view.marks, axis)]);
  }, () => cross.setAttribute("visibility", "hidden"));
}

function labelsAt(curves, place, unit, marks, axis) {
  const lines = curves.map((curve) => [curve, curve.y[curve.at.indexOf(place)]]).filter(([, value]) => value !== null && value !== undefined);
  const found = lines.slice(0, MAX_LABELLED).map(([curve, value]) => [curveColour(curve), `${curve.name} ${formatNumber(unit === "share" ? 100 * value : value)}${unit === "share" ? "%" : ""}`]);
  if (lines.length > MAX_LABELLED) found.push([null, `and ${lines.length - MAX_LABELLED} more in the table`]);
  if (axis.unit !== "step") return found;
  for (const run of marks) for (const mark of data.marks[run].filter((item) => item.step === place).slice(0, 3)) found.push([null, `${GLYPH_NAMES[mark.kind]}: ${mark.text}`]);
  return found;
}

function stack(curves) {
  const base = new Map();
  return curves.map((curve) => {
    const bottom = curve.at.map((place) => base.get(place) ?? 0);
    const y = curve.y.map((value, index) => bottom[index] + (value ?? 0));
    curve.at.forEach((place, index) => base.set(place, y[index]));
    return { ...curve, y, bottom };
  });
}

/* All values, or without the first steps: up to the 90th percentile of the smoothed curves and the held-out points after step 0. */
function yRange(curves, view, unit, useful) {
  const numbers = (list) => list.filter((value) => value !== null);
  const all = numbers(curves.flatMap((curve) => curve.y));
  let low = Math.min(...all), high = Math.max(...all);
  if (!all.length) return [0, 1];
  if (useful && unit !== "share") {
    const lines = curves.filter((curve) => !curve.markers && curve.y.length > 10);
    const bounds = lines.map((curve) => numbers(curve.smooth ?? curve.y).sort((a, b) => a - b)).map((sorted) => sorted[Math.floor(0.9 * (sorted.length - 1))]);
    const points = curves.filter((curve) => curve.markers).flatMap((curve) => numbers(curve.y.filter((_, index) => curve.x[index] > 0)));
    if (bounds.length) high = Math.max(...bounds, ...points);
    low = Math.min(...numbers(lines.flatMap((curve) => curve.smooth ?? curve.y)), ...points);
  }
  if (view.stack || FROM_ZERO.includes(unit)) low = Math.min(0, low);
  if (low === high) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const room = 0.05 * (high - low);
  return [low === 0 ? 0 : low - room, high + room];
}

function pathOf(xs, ys, toX, toY) {
  let path = "", drawing = false;
  xs.forEach((x, index) => {
    const there = x !== null && ys[index] !== null;
    if (there) path += `${drawing ? "L" : "M"}${toX(x).toFixed(1)} ${toY(ys[index]).toFixed(1)}`;
    drawing = there;
  });
  return path;
}

function drawCurve(parent, curve, view, toX, toY) {
  const colour = curveColour(curve);
  const line = (ys, kind) => {
    const path = svg("path", { class: `curve ${kind}${curve.x.length > MANY_POINTS ? " dense" : ""}`, d: pathOf(curve.at, ys, toX, toY), "data-curve": curve.name });
    path.style.stroke = colour;
    if (curve.depth === undefined && STROKES[curve.dash % STROKES.length]) path.setAttribute("stroke-dasharray", STROKES[curve.dash % STROKES.length]);
    parent.append(path);
  };
  if (view.stack) {
    const back = curve.at.map((place, index) => `L${toX(place).toFixed(1)} ${toY(curve.bottom[index]).toFixed(1)}`).reverse().join("");
    const area = svg("path", { class: "area", d: `${pathOf(curve.at, curve.y, toX, toY)}${back}Z`, "data-curve": curve.name });
    area.style.fill = colour;
    parent.append(area);
    return;
  }
  if (curve.smooth) { line(curve.y, "raw"); line(curve.smooth, "smooth"); }
  else line(curve.y, curve.markers ? "held" : "");
  if (curve.markers || curve.x.length < 2) curve.at.forEach((place, index) => {
    if (place === null || curve.y[index] === null) return;
    const point = svg("circle", { class: "point", cx: toX(place), cy: toY(curve.y[index]), r: 4 });
    point.style.fill = colour;
    parent.append(point);
  });
}

function drawEvents(parent, runs, axis, toX, box, hidden) {
  if (axis.key !== "x") return;
  for (const run of runs) {
    const colour = data.runs.length > 1 && runs.length > 1 ? `var(--curve-${run % NUM_COLOURS})` : "var(--text)";
    for (const mark of data.marks[run].slice(-60)) {
      if (hidden.has(mark.kind)) continue;
      const x = toX(axis.log ? Math.max(1, mark.step) : mark.step);
      const glyph = svg("path", { class: "glyph", d: GLYPHS[mark.kind], transform: `translate(${x} ${box.bottom - 8 - 12 * Object.keys(GLYPHS).indexOf(mark.kind)})` });
      const line = svg("line", { class: "event", x1: x, x2: x, y1: box.top, y2: box.bottom });
      for (const part of [glyph, line]) part.style.stroke = colour;
      glyph.style.fill = mark.kind === "alert" ? "none" : colour;
      parent.append(line, glyph);
    }
  }
}

function swatch(curve, filled) {
  const picture = svg("svg", { width: 26, height: 12, "aria-hidden": "true" });
  const part = filled ? svg("rect", { width: 26, height: 12 }) : curve.markers ? svg("circle", { cx: 13, cy: 6, r: 4 }) : svg("line", { x1: 0, x2: 26, y1: 6, y2: 6, "stroke-width": 2.5, "stroke-dasharray": curve.depth === undefined ? STROKES[curve.dash % STROKES.length] : "" });
  part.style[filled || curve.markers ? "fill" : "stroke"] = curveColour(curve);
  picture.append(part);
  return picture;
}

function glyphSwatch(kind) {
  const glyph = svg("path", { class: "glyph", d: GLYPHS[kind], transform: "translate(8 6)" });
  glyph.style.stroke = "var(--text)";
  glyph.style.fill = kind === "alert" ? "none" : "var(--text)";
  return svg("svg", { width: 16, height: 12, "aria-hidden": "true" }, glyph);
}

/* A button per curve and per kind of event in the chart. */
function legendItems(view) {
  const curves = view.curves.length > 1 ? view.curves.map((curve) => [curve.name, curve.name, () => swatch(curve, view.stack)]) : [];
  const kinds = new Set(view.marks.flatMap((run) => data.marks[run].map((mark) => mark.kind)));
  return [...curves, ...[...kinds].map((kind) => [kind, GLYPH_NAMES[kind], () => glyphSwatch(kind)])];
}
