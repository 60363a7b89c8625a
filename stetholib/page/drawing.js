"use strict";
/* Small tools: elements, numbers as they are read, and pictures drawn as SVG at the width that there is. */

const make = (name, attributes = {}, ...children) => {
  const node = /^(svg|g|line|circle|rect|path|text|tspan|title|desc)$/.test(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};
const find = (id) => document.getElementById(id);
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
const signed = (x, digits = 1) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(digits)}`;
const spaced = (name) => name.replaceAll("_", " ");
const titled = (name) => { const words = spaced(name); return words[0].toUpperCase() + words.slice(1); };
const called = (name) => name === "full" ? "Whole vector" : name === "full_shrunk" ? "Whole vector, shrunk" : titled(name);
const list = (words) => words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);

const Drawing = (() => {
  let count = 0;
  const drawn = new Map();
  const watch = new ResizeObserver((entries) => {
    for (const {target, contentRect} of entries) {
      const one = drawn.get(target), width = Math.round(contentRect.width);
      if (one && width && width !== one.width) paint(target, one, width);
    }
  });

  function paint(host, one, width) {
    one.width = width;
    const id = `picture-${one.id}`;
    const svg = make("svg", {role: "img", "aria-labelledby": `${id}-title ${id}-desc`, width, height: one.height,
      viewBox: `0 0 ${width} ${one.height}`},
      make("title", {id: `${id}-title`}, one.title), make("desc", {id: `${id}-desc`}, one.desc));
    one.draw(svg, width, one.height);
    host.replaceChildren(svg);
  }

  /** A picture in this place, drawn anew whenever its width changes; draw(svg, width, height). */
  function picture(host, {title, desc, height}, draw) {
    const one = {title, desc, height, draw, id: drawn.get(host)?.id ?? ++count};
    drawn.set(host, one);
    paint(host, one, Math.max(260, Math.round(host.clientWidth)));
    watch.observe(host);
  }

  const scale = (from, to, low, high) => Object.assign((x) => low + (x - from) / (to - from) * (high - low), {from, to, low, high});

  /** Round numbers between two ends. */
  function ticks(from, to, about = 5) {
    const raw = (to - from) / about, ten = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((x) => x * ten).find((x) => x >= raw), found = [];
    for (let x = Math.ceil(from / step - 1e-9) * step; x <= to + 1e-9 * step; x += step) found.push(Math.abs(x) < step / 1e6 ? 0 : x);
    return found;
  }

  const text = (svg, x, y, words, more = {}) => svg.append(make("text", {x, y, ...more}, words));
  const line = (svg, x1, y1, x2, y2, kind) => svg.append(make("line", {x1, y1, x2, y2, class: kind}));

  /** The layers below a picture, and lines with numbers at its left. */
  function axes(svg, x, y, layers, label, format) {
    for (const at of ticks(y.from, y.to, 4)) {
      line(svg, x.low, y(at), x.high, y(at), "grid");
      text(svg, x.low - 6, y(at) + 4, format(at), {"text-anchor": "end", class: "small"});
    }
    const every = x.high - x.low < 22 * layers.length ? 2 : 1;
    for (const layer of layers.filter((_, i) => i % every === 0)) text(svg, x(layer), y.low + 18, layer, {"text-anchor": "middle", class: "small"});
    text(svg, (x.low + x.high) / 2, y.low + 36, label, {"text-anchor": "middle", class: "small"});
  }

  const path = (svg, points, kind) =>
    svg.append(make("path", {d: points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join(""), class: kind}));
  const dot = (svg, x, y, r, kind) => svg.append(make("circle", {cx: x, cy: y, r, class: kind}));

  /** Labels at the right of lines, moved apart where they would overlap. */
  function labels(svg, x, wanted, gap = 16) {
    const placed = wanted.map((one) => ({...one})).sort((a, b) => a.y - b.y);
    for (let i = 1; i < placed.length; i++) placed[i].y = Math.max(placed[i].y, placed[i - 1].y + gap);
    for (const one of placed) {
      dot(svg, x + 4, one.y - 1, 4, one.kind);
      text(svg, x + 12, one.y + 3, one.words, {class: "label"});
    }
  }

  return {picture, scale, ticks, text, line, axes, path, dot, labels};
})();
