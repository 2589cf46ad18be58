/* Helpers of the charts: elements, numbers, axes, the label at the mouse. Texts in the data come from outside: they enter the page as
   text nodes or attributes only. */
"use strict";
const data = JSON.parse(document.getElementById("report-data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const FONT = 12;

function element(tag, text = null, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const formatNumber = (value) => (value === null || value === undefined ? "" : Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 }));

function withPrefix(value, unit = "") {
  const prefixes = ["", "k", "M", "G", "T", "P"];
  let level = 0;
  for (; Math.abs(value) >= 1000 && level < prefixes.length - 1; level++) value /= 1000;
  return `${Number(value.toPrecision(3))}${level || unit ? " " : ""}${prefixes[level]}${unit}`.trimEnd();
}

/* A value with its unit, as ticks and labels say it. */
function formatValue(value, unit) {
  if (unit === "share") return `${Number((100 * value).toPrecision(4))}%`;
  if (unit.startsWith("bytes per step") || unit === "bytes") return withPrefix(value, "B");
  if (unit === "seconds") return value >= 120 ? `${Number((value / 60).toPrecision(3))} min` : `${Number(value.toPrecision(3))} s`;
  if (unit === "step") return value.toLocaleString("en");
  return Math.abs(value) >= 10000 ? withPrefix(value) : Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
}

function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * step; index++) found.push(Number((index * step).toPrecision(12)));
  return found;
}

function logTicks(low, high, wanted) {
  const found = [];
  const decades = Math.log10(high / low);
  const factors = decades * 3 <= wanted ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of factors) if (factor * 10 ** power >= low && factor * 10 ** power <= high) found.push(factor * 10 ** power);
  return found;
}

const text = (content, x, y, attributes = {}) => svg("text", { x, y, ...attributes }, content);
const widthOf = (content) => 0.6 * FONT * String(content).length;

/* The axes of a chart: grid lines, numbers and titles around the inner box. */
function drawAxes(root, box, xTicks, yTicks, titles, grid = true) {
  const axes = svg("g", { class: "axes" });
  for (const [at, label] of yTicks) axes.append(svg("line", { x1: grid ? box.left : box.left - 4, x2: grid ? box.right : box.left, y1: at, y2: at }), text(label, box.left - 6, at + 4, { "text-anchor": "end" }));
  let free = -Infinity;
  for (const [at, label] of xTicks) {
    const anchor = at > box.right - widthOf(label) / 2 ? "end" : "middle";
    const begin = anchor === "end" ? Math.min(at, box.right) - widthOf(label) : at - widthOf(label) / 2;
    if (begin < free) continue;
    free = begin + widthOf(label) + 6;
    axes.append(svg("line", { x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 }), text(label, Math.min(at, box.right), box.bottom + 17, { "text-anchor": anchor }));
  }
  axes.append(svg("line", { class: "base", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  axes.append(text(titles.x, (box.left + box.right) / 2, box.bottom + 33, { "text-anchor": "middle" }));
  if (titles.y) axes.append(text(titles.y, 12, (box.top + box.bottom) / 2, { "text-anchor": "middle", transform: `rotate(-90 12 ${(box.top + box.bottom) / 2})` }));
  root.append(axes);
}

/* The label at the mouse: a list of lines, kept inside the plot. */
function showLabel(plot, x, y, lines) {
  let label = plot.querySelector(".hover");
  if (!label) plot.append((label = element("div", null, { class: "hover" })));
  label.replaceChildren(...lines.map(([colour, content]) => {
    const line = element("div");
    if (colour) {
      const dot = element("i");
      dot.style.background = colour;
      line.append(dot);
    }
    line.append(content);
    return line;
  }));
  label.hidden = false;
  const over = x + 14 + label.offsetWidth > plot.clientWidth;
  label.style.left = `${Math.max(0, over ? x - 14 - label.offsetWidth : x + 14)}px`;
  label.style.top = `${Math.max(0, Math.min(y - label.offsetHeight / 2, plot.clientHeight - label.offsetHeight))}px`;
}

function hideLabel(plot) {
  const label = plot.querySelector(".hover");
  if (label) label.hidden = true;
}

function onHover(target, plot, move, leave = () => {}) {
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    move(event.clientX - box.left, event.clientY - box.top);
  };
  target.addEventListener("pointermove", follow);
  target.addEventListener("pointerdown", follow);
  target.addEventListener("pointerleave", () => { hideLabel(plot); leave(); });
}
