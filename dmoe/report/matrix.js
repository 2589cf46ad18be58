/* Heat maps. The colour is the logarithm of a number over its expectation: near-white at 1, blue below, orange above, the same in all
   charts and pages; a cell of zero has a mark of its own. `axes.fair` is the expectation: the mean of the "column" or the "row"; "margins",
   sum of the row times sum of the column over the sum; "pairs", the same for chosen pairs, by the loads of the two experts. */
const STOPS = { light: [[8, 81, 156], [107, 174, 214], [247, 247, 245], [253, 174, 107], [217, 72, 1]], dark: [[30, 96, 176], [96, 156, 204], [224, 226, 228], [242, 164, 94], [226, 96, 20]] };
const MAX_LOG2 = 2;
const NONE = { light: [38, 32, 56], dark: [0, 0, 0] };
const STEPS = 254;
const decoded = new WeakMap();

/* The numbers of a view: as written, or decoded from one byte each. */
function numbersOf(view) {
  if (view.z) return view.z;
  if (!decoded.has(view)) {
    const bytes = Uint8Array.from(atob(view.codes), (letter) => letter.charCodeAt(0));
    const value = (code) => (code ? Math.round(view.low * (view.high / view.low) ** ((code - 1) / STEPS)) : 0);
    decoded.set(view, view.y.map((_, row) => Array.from(bytes.subarray(row * view.x.length, (row + 1) * view.x.length), value)));
  }
  return decoded.get(view);
}

function ratios(view, fair) {
  const z = numbersOf(view);
  const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);
  const mean = (values) => sum(values) / Math.max(1, values.filter((value) => value !== null).length);
  const rows = z.map(sum);
  const columns = z[0].map((_, column) => sum(z.map((row) => row[column])));
  const total = sum(rows);
  let expected;
  if (fair === "row") { const means = z.map(mean); expected = (row) => means[row]; }
  else if (fair === "column") { const means = z[0].map((_, column) => mean(z.map((row) => row[column]))); expected = (_, column) => means[column]; }
  else if (fair === "margins") expected = (row, column) => (rows[row] * columns[column]) / total;
  else {
    const load = view.loads;
    const all = sum(load) ** 2 - sum(load.map((value) => value * value));
    expected = (row, column) => (total * load[row] * load[column]) / all;
  }
  return z.map((row, i) => row.map((value, j) => (value === null ? null : value && expected(i, j) ? value / expected(i, j) : 0)));
}

function cellColour(ratio, scheme) {
  if (ratio === 0) return `rgb(${NONE[scheme].join(",")})`;
  const stops = STOPS[scheme];
  const place = ((Math.max(-MAX_LOG2, Math.min(MAX_LOG2, Math.log2(ratio))) + MAX_LOG2) / (2 * MAX_LOG2)) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  return `rgb(${stops[low].map((from, index) => Math.round(from + (stops[low + 1][index] - from) * (place - low))).join(",")})`;
}

/* The rows from top to bottom: as numbered, or by their mean load, or the layers by their busiest expert. */
function rowOrder(values, order, fair) {
  const rows = values.map((_, index) => index);
  if (order !== "by load") return rows;
  const known = values.map((row) => row.filter((value) => value !== null));
  const size = known.map((row) => (fair === "row" ? Math.max(...row) : row.reduce((sum, value) => sum + value, 0) / Math.max(1, row.length)));
  return rows.sort((a, b) => size[b] - size[a] || a - b);
}

function drawMatrix(figure, chart, view, options, hidden, width) {
  const plot = figure.querySelector(".plot");
  const scheme = dark.matches && !document.documentElement.classList.contains("print") ? "dark" : "light";
  const values = ratios(view, chart.axes.fair);
  const counts = numbersOf(view);
  const order = rowOrder(values, options.order, chart.axes.fair);
  const names = order.map((row) => String(view.y[row]));
  const tall = Boolean(figure.closest("#overview"));
  const left = Math.min(0.35 * width, 30 + Math.max(...names.map((name) => widthOf(name))));
  const square = view.x.length === view.y.length ? (width - left - 12) / view.x.length : Infinity;
  const cellHeight = Math.max(3, Math.min(square, view.y.length > 32 ? 5.5 : 26, 22 * 16 / view.y.length));
  const inner = tall ? 258 : view.y.length * cellHeight;
  const box = { left, right: width - 12, top: 48, bottom: 48 + inner };
  if (square < 26 * 1.01 && !tall) box.bottom = box.top + (box.right - box.left);
  const height = box.bottom + 42;
  const cell = { width: (box.right - box.left) / view.x.length, height: (box.bottom - box.top) / view.y.length };
  const canvas = paint(values, order, box, cell, scheme);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "drawn" });
  const every = (labels, space, size) => Math.ceil(((Math.max(...labels.map((label) => widthOf(label))) + 8) * (size === "x" ? 1 : 0) + (size === "x" ? 0 : 13)) / space) || 1;
  const xNames = view.x.map((name) => (typeof name === "number" ? name.toLocaleString("en") : name));
  const xEvery = every(xNames, cell.width, "x"), yEvery = every(names, cell.height, "y");
  const xTicks = xNames.map((name, index) => [box.left + (index + 0.5) * cell.width, name]).filter((_, index) => index % xEvery === 0);
  const longest = Math.floor((left - 26) / (0.56 * FONT));
  const yTicks = names.map((name, index) => [box.top + (index + 0.5) * cell.height, name.length > longest ? `${name.slice(0, longest - 1)}…` : name]).filter((_, index) => index % yEvery === 0);
  drawAxes(root, box, xTicks, yTicks, { x: chart.axes.x, y: chart.axes.y }, false);
  drawScale(root, chart, box, scheme);
  const target = svg("rect", { class: "target", x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top });
  root.append(target);
  plot.replaceChildren(canvas, root);
  onHover(target, plot, (x, y) => {
    const column = Math.max(0, Math.min(view.x.length - 1, Math.floor((x - box.left) / cell.width)));
    const row = order[Math.max(0, Math.min(order.length - 1, Math.floor((y - box.top) / cell.height)))];
    const value = values[row][column], count = counts[row][column];
    const said = value === null ? ["not counted"] : [`${value.toFixed(3)} ${chart.axes.z}`, `${count.toLocaleString("en")} ${chart.axes.count}${view.codes ? " (rounded)" : ""}`];
    showLabel(plot, x, y, [`${chart.axes.x} ${xNames[column]}`, `${chart.axes.y} ${view.y[row]}`, ...said].map((line) => [null, line]));
  });
}

function paint(values, order, box, cell, scheme) {
  const dense = Math.min(2, devicePixelRatio || 1);
  const [width, height] = [box.right - box.left, box.bottom - box.top];
  const canvas = element("canvas", null, { width: Math.max(1, Math.round(width * dense)), height: Math.max(1, Math.round(height * dense)), "aria-hidden": "true" });
  Object.assign(canvas.style, { left: `${box.left}px`, top: `${box.top}px`, width: `${width}px`, height: `${height}px` });
  const brush = canvas.getContext("2d");
  brush.scale(canvas.width / width, canvas.height / height);
  const gap = Math.min(cell.width, cell.height) >= 12 ? 1 : 0;
  order.forEach((row, place) => values[row].forEach((value, column) => {
    if (value === null) return;
    const [x, y] = [column * cell.width, place * cell.height];
    brush.fillStyle = cellColour(value, scheme);
    /* without a gap, cells overlap by half a pixel, so that no seam shows */
    brush.fillRect(x, y, cell.width - gap + (gap ? 0 : 0.5), cell.height - gap + (gap ? 0 : 0.5));
    if (value || Math.min(cell.width, cell.height) < 8) return;
    brush.strokeStyle = "#fff";
    brush.beginPath();
    for (const slope of [1, -1]) {
      brush.moveTo(x + cell.width / 2 - 3, y + cell.height / 2 - 3 * slope);
      brush.lineTo(x + cell.width / 2 + 3, y + cell.height / 2 + 3 * slope);
    }
    brush.stroke();
  }));
  return canvas;
}

/* The scale above the map: 1/4 to 4 times, and the mark of zero. */
function drawScale(root, chart, box, scheme) {
  const none = chart.axes.count === "assignments" ? "no token" : "none";
  const length = Math.min(260, box.right - box.left - widthOf(none) - 50);
  const id = `scale-${root.parentNode ? "" : chart.title.replace(/\W/g, "")}-${Math.round(box.right)}`;
  const gradient = svg("linearGradient", { id });
  for (let step = 0; step <= 20; step++) gradient.append(svg("stop", { offset: step / 20, "stop-color": cellColour(2 ** (((2 * step) / 20 - 1) * MAX_LOG2), scheme) }));
  const group = svg("g", { class: "axes" }, gradient, svg("rect", { x: box.left, y: 8, width: length, height: 10, fill: `url(#${id})` }));
  ["≤ ¼", "½", "1", "2", "≥ 4"].forEach((name, index) => group.append(text(name, box.left + (length * index) / 4, 32, { "text-anchor": index === 0 ? "start" : index === 4 ? "end" : "middle" })));
  group.append(svg("rect", { x: box.left + length + 22, y: 7, width: 12, height: 12, fill: cellColour(0, scheme), stroke: "var(--quiet)" }), text(none, box.left + length + 39, 17));
  root.append(group);
}
