/* Draws the charts of a report from the JSON in #report-data. Texts in it come from outside: they enter the page as text nodes, or
   through escapeTags() if the plotting library would interpret tags in them. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const STROKES = ["", "7 4", "2 3", "7 3 2 3", "11 4", "11 3 2 3"];
  const SYMBOLS = { restart: "triangle-up", rollback: "triangle-left", alert: "x", skip: "diamond", checkpoint: "square-open", end: "circle-open" };
  const LINES = ["restart", "rollback", "alert", "skip"];
  const FROM_ZERO = ["share", "tokens", "experts", "tokens/s", "bytes", "bytes per step"];
  const PRINTED_WIDTH = 660;
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const hidden = new Map(figures.map((figure) => [figure, new Set()]));

  const escapeTags = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const formatNumber = (value) => (value === null || value === undefined ? "" : Number(value.toPrecision(5)).toLocaleString("en"));

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const list = (name) => read(name).split(",").map((colour) => colour.trim());
    return { text: read("--text"), quiet: read("--quiet"), line: read("--line"), page: read("--page"), curves: list("--curves"), depth: list("--depth"),
      family: style.fontFamily, size: Math.round(0.8 * parseFloat(style.fontSize)) };
  }

  const mix = (low, high, share) => "#" + [1, 3, 5].map((at) => {
    const [from, to] = [low, high].map((colour) => parseInt(colour.slice(at, at + 2), 16));
    return Math.round(from + (to - from) * share).toString(16).padStart(2, "0");
  }).join("");

  function curveColour(curve, look) {
    if (curve.depth === undefined) return look.curves[curve.colour % look.curves.length];
    const place = curve.depth * (look.depth.length - 1);
    const low = Math.min(Math.floor(place), look.depth.length - 2);
    return mix(look.depth[low], look.depth[low + 1], place - low);
  }

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function selectedKeys(figure, chart) {
    return chart.choices.map((_, position) => figure.querySelector(`select[data-choice="${position}"]`)?.value ?? "0");
  }

  function layout(look, figure, chart) {
    /* Plotly puts the title of a horizontal axis between its numbers if there is space; an annotation stays below them. */
    const below = { text: escapeTags(chart.axes.x), xref: "paper", yref: "paper", x: 0.5, y: 0, yanchor: "top", yshift: -1.9 * look.size, showarrow: false };
    const axis = (name) => ({ title: name === "y" ? { text: escapeTags(chart.axes.y), standoff: 6, font: { size: look.size } } : undefined, gridcolor: look.line, zerolinecolor: look.line, linecolor: look.quiet,
      tickcolor: look.line, automargin: name === "y", fixedrange: coarse.matches });
    return { paper_bgcolor: look.page, plot_bgcolor: look.page, font: { color: look.text, size: look.size, family: look.family }, showlegend: false,
      margin: { l: 3.4 * look.size, r: look.size, t: 8, b: 3.6 * look.size }, annotations: [below], xaxis: axis("x"), yaxis: axis("y"), dragmode: coarse.matches ? false : "zoom",
      hoverlabel: { bgcolor: look.page, bordercolor: look.quiet, font: { color: look.text, size: look.size }, namelength: -1 }, separators: ".,",
      width: printing ? PRINTED_WIDTH : figure.querySelector(".plot").clientWidth || undefined };
  }

  function curves(figure, chart, view, look) {
    const off = hidden.get(figure);
    const traces = view.curves.map((curve) => {
      const colour = curveColour(curve, look);
      const trace = { type: "scatter", name: escapeTags(curve.name), x: curve.x, y: curve.y, visible: !off.has(curve.name), line: { color: colour, width: 1.8 },
        mode: curve.markers || curve.x.length < 2 ? "lines+markers" : "lines", marker: { color: colour, size: 6 },
        hovertemplate: "step %{x:,}<br>%{y:.5g}" };
      if (view.stack) return { ...trace, stackgroup: "all", fillcolor: colour, line: { color: look.page, width: 0.5 } };
      trace.line.dash = curve.depth === undefined ? DASHES[curve.dash % DASHES.length] : "solid";
      return trace;
    });
    const frame = layout(look, figure, chart);
    const last = Math.max(...view.curves.map((curve) => curve.x[curve.x.length - 1]));
    frame.xaxis.range = [0, Math.max(1, last) * 1.02];
    frame.xaxis.tickformat = ",~";
    frame.height = chart.height ?? 290;
    if (chart.axes.y === "share") frame.yaxis.tickformat = ",.3~%";
    if (chart.axes.y.startsWith("bytes")) Object.assign(frame.yaxis, { tickformat: "~s", ticksuffix: "B" });
    if (view.stack || FROM_ZERO.includes(chart.axes.y)) frame.yaxis.rangemode = "tozero";
    frame.yaxis2 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
    frame.shapes = [];
    if (off.has("events")) return { traces, frame };
    for (const run of view.marks) {
      const colour = data.runs.length > 1 && view.marks.length > 1 ? look.curves[run % look.curves.length] : look.text;
      const marks = data.marks[run];
      if (!marks.length) continue;
      traces.push({ type: "scatter", mode: "markers", name: "events", yaxis: "y2", x: marks.map((mark) => mark.step), y: marks.map(() => 0.03), cliponaxis: false,
        marker: { symbol: marks.map((mark) => SYMBOLS[mark.kind] ?? "star"), size: marks.map((mark) => (LINES.includes(mark.kind) ? 9 : 6)), color: colour },
        text: marks.map((mark) => escapeTags(wrapWords(`${mark.kind}${data.runs.length > 1 ? ` (${data.runs[run]})` : ""}: ${mark.text}`))).map((text) => text.replace(/\n/g, "<br>")),
        hovertemplate: "step %{x:,}<br>%{text}<extra></extra>" });
      for (const mark of marks.filter((mark) => LINES.includes(mark.kind)).slice(-40))
        frame.shapes.push({ type: "line", x0: mark.step, x1: mark.step, yref: "paper", y0: 0, y1: 1, line: { color: colour, width: 1, dash: "dot" }, layer: "below" });
    }
    return { traces, frame };
  }

  /* Plotly does not wrap hover labels. */
  const wrapWords = (text) => text.replace(/\s+/g, " ").replace(/(.{1,44})(?:\s|$)|(.{44})/g, "$1$2\n").trimEnd();

  function timesFairShare(z, fair) {
    const mean = (values) => values.reduce((sum, value) => sum + (value ?? 0), 0) / Math.max(1, values.filter((value) => value !== null).length);
    const divide = (value, by) => (value === null ? null : by ? value / by : 0);
    if (fair === "row") return z.map((row) => row.map((value) => divide(value, mean(row))));
    const means = z[0].map((_, column) => mean(z.map((row) => row[column])));
    return z.map((row) => row.map((value, column) => divide(value, means[column])));
  }

  function matrixValues(chart, view) {
    return chart.axes.fair ? timesFairShare(view.z, chart.axes.fair) : view.z;
  }

  /* At least twice the fair share, and the 99th percentile of the cells, so that one extreme step does not darken all others. */
  function colourScaleEnd(values, fair) {
    const sorted = values.flat().filter((value) => value !== null).sort((a, b) => a - b);
    const highest = sorted[sorted.length - 1] ?? 1;
    return fair ? Math.max(2, sorted[Math.floor(0.99 * (sorted.length - 1))] ?? 2) : highest || 1;
  }

  function matrix(figure, chart, view, look) {
    const values = matrixValues(chart, view);
    const words = (labels) => labels.map((label) => (typeof label === "string" ? escapeTags(label) : label));
    const frame = layout(look, figure, chart);
    const counted = chart.axes.fair ? `%{z:.3f} ${chart.axes.z}<br>%{customdata:,} ${chart.axes.count}` : `%{z:,} ${chart.axes.z}`;
    const trace = { type: "heatmap", x: words(view.x), y: words(view.y), z: values, customdata: view.z, zmin: 0, zmax: colourScaleEnd(values, chart.axes.fair), colorscale: "Cividis",
      hovertemplate: `${chart.axes.x} %{x}<br>${chart.axes.y} %{y}<br>${counted}<extra></extra>`, hoverongaps: false,
      colorbar: { orientation: "h", y: 1, yanchor: "bottom", thickness: 10, len: 1, x: 0.5, outlinewidth: 0, title: { text: escapeTags(chart.axes.z), side: "top", font: { size: look.size } } } };
    const widest = Math.max(...view.y.map((label) => String(label).length));
    frame.margin = { t: 4.7 * look.size, r: look.size, b: 3.6 * look.size, l: Math.min(0.4 * frame.width, 2.8 * look.size + 0.62 * widest * look.size), autoexpand: false };
    frame.yaxis.automargin = false;
    frame.height = Math.min(720, Math.max(chart.axes.x === "step" ? 320 : 250, 120 + view.y.length * (view.y.length > 32 ? 9 : 22)));
    frame.yaxis.autorange = "reversed";
    for (const [name, labels] of [["xaxis", view.x], ["yaxis", view.y]]) {
      frame[name].showgrid = frame[name].zeroline = false;
      if (typeof labels[0] === "string") frame[name].type = "category";
      else if (chart.axes[name[0]] !== "step") {
        const every = Math.ceil((labels.length * 26) / (name === "xaxis" ? frame.width - 60 : frame.height));
        Object.assign(frame[name], { tickmode: "array", tickvals: labels.filter((_, index) => index % every === 0), tickformat: "d" });
      }
      else frame[name].tickformat = ",~";
    }
    return { traces: [trace], frame };
  }

  function legend(figure, chart, view, look) {
    const list = figure.querySelector(".legend");
    const off = hidden.get(figure);
    const focused = list.contains(document.activeElement) ? document.activeElement.textContent : null;
    list.replaceChildren();
    if (chart.kind !== "curves") return;
    const items = (view.curves.length > 1 ? view.curves : []).map((curve) => [curve.name, curveColour(curve, look), view.stack || curve.depth !== undefined ? "" : STROKES[curve.dash % STROKES.length]]);
    if (view.marks.some((run) => data.marks[run].length)) items.push(["events", look.text, "marks"]);
    for (const [name, colour, stroke] of items) {
      const button = element("button", null, { type: "button", "aria-pressed": String(!off.has(name)) });
      button.append(swatch(colour, stroke, view.stack), element("span", name));
      button.addEventListener("click", () => { off.has(name) ? off.delete(name) : off.add(name); draw(figure); });
      const item = element("li", null);
      item.append(button);
      list.append(item);
      if (focused === name) button.focus();
    }
  }

  function swatch(colour, stroke, filled) {
    const make = (tag, attributes) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      return made;
    };
    const picture = make("svg", { width: 26, height: 10, "aria-hidden": "true" });
    if (stroke === "marks") picture.append(make("path", { d: "M8 9 L13 1 L18 9 Z", fill: colour }));
    else if (filled) picture.append(make("rect", { width: 26, height: 10, fill: colour }));
    else picture.append(make("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": stroke }));
    return picture;
  }

  function numbersTable(chart, view) {
    const head = chart.kind === "curves" ? ["Curve", "First", "Lowest", "Highest", "Last"] : [`${chart.axes.y} / ${chart.axes.x}`, ...view.x.map(String)];
    const rows = chart.kind === "curves" ? view.curves.map(curveSummary)
      : view.z.map((row, index) => [String(view.y[index]), ...row.map(formatNumber)]);
    const table = element("table", null);
    const unit = chart.kind === "curves" ? (chart.axes.y ? `In ${chart.axes.y}; the step in brackets` : "The step in brackets") : `In ${chart.axes.count ?? chart.axes.z}`;
    table.append(caption(unit));
    const top = table.createTHead().insertRow();
    for (const name of head) top.append(element("th", name, { scope: "col" }));
    const body = table.createTBody();
    for (const [first, ...cells] of rows) {
      const line = body.insertRow();
      line.append(element("th", first, { scope: "row" }), ...cells.map((cell) => element("td", cell)));
    }
    return table;
  }

  function caption(text) {
    const made = element("caption", null);
    made.append(element("span", text));
    return made;
  }

  function curveSummary(curve) {
    const there = curve.y.map((value, index) => [value, curve.x[index]]).filter(([value]) => value !== null);
    const say = ([value, step]) => `${formatNumber(value)} (${step.toLocaleString("en")})`;
    const pick = (better) => there.reduce((best, item) => (better(item[0], best[0]) ? item : best));
    return [curve.name, say(there[0]), say(pick((a, b) => a < b)), say(pick((a, b) => a > b)), say(there[there.length - 1])];
  }

  function draw(figure) {
    const chart = data.charts[figure.dataset.chart];
    const keys = selectedKeys(figure, chart);
    const view = chart.views[keys.join("|")];
    const [plot, missing, details] = [".plot", ".missing", "details"].map((name) => figure.querySelector(name));
    for (const part of [plot, details]) part.hidden = !view;
    missing.hidden = Boolean(view);
    if (!view) {
      figure.querySelector(".legend").replaceChildren();
      missing.textContent = `Not recorded: ${keys.map((key, position) => chart.choices[position].options[key]).join(", ")}.`;
      return;
    }
    const look = theme();
    legend(figure, chart, view, look);
    const { traces, frame } = (chart.kind === "curves" ? curves : matrix)(figure, chart, view, look);
    Plotly.react(plot, traces, frame, { displayModeBar: false, displaylogo: false, showTips: false });
    if (details.open) details.querySelector(".scroll").replaceChildren(numbersTable(chart, view));
  }

  /* Browsers print the page as drawn, so draw it in light colours and as wide as paper, whatever the screen is. */
  let printing = false;
  function setPrinting(begins) {
    printing = begins;
    document.documentElement.classList.toggle("print", begins);
    figures.forEach(draw);
  }

  function initialize(figure) {
    const chart = data.charts[figure.dataset.chart];
    Object.keys(chart.views)[0].split("|").forEach((key, position) => {
      const select = figure.querySelector(`select[data-choice="${position}"]`);
      if (select) select.value = key;
    });
    for (const select of figure.querySelectorAll("select")) select.addEventListener("change", () => draw(figure));
    figure.querySelector("details").addEventListener("toggle", () => draw(figure));
    new ResizeObserver(() => {
      const plot = figure.querySelector(".plot");
      if (!printing && plot.layout && !plot.hidden && Math.abs(plot.layout.width - plot.clientWidth) > 1) draw(figure);
    }).observe(figure);
    draw(figure);
  }

  const coarse = matchMedia("(pointer: coarse)");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(draw));
  addEventListener("beforeprint", () => setPrinting(true));
  addEventListener("afterprint", () => setPrinting(false));
  /* Draw one chart at a time, so that the page can be read and scrolled meanwhile. */
  const waiting = [...figures];
  const drawNext = () => {
    if (!waiting.length) return void (document.documentElement.dataset.drawn = "all");
    initialize(waiting.shift());
    return void setTimeout(drawNext);
  };
  drawNext();
})();
