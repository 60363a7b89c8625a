"use strict";
/* The game: pick as many layers as the stethoscope does. Every possible set was measured beforehand, so a pick has a place among
   them all; what lies within the noise of the pick (two standard errors, over the same problems) is grey. */

const Game = (() => {
  const {picture, scale, text, line, dot} = Drawing;
  let games, world, picks = new Set(), revealed = false;

  function open(data) {
    games = data.games.map((one) => ({...one, errors: Gemma.numbers(one.errors), place: new Map(one.layers.map((l, i) => [l, i]))}));
    find("world").append(...games.map((one, i) => make("option", {value: i}, `${titled(one.title)} (${one.known ? "layers known" : "nobody knows"})`)));
    find("world").addEventListener("change", () => { picks.clear(); revealed = false; choose(); });
    find("reveal").addEventListener("click", () => { revealed = true; show(); });
    find("again").addEventListener("click", () => { picks.clear(); show(); });
    choose();
  }

  const size = () => world.layers[0].split(" ").length;

  function choose() {
    world = games[Number(find("world").value)];
    const count = Math.max(...world.layers.flatMap((l) => l.split(" ").map(Number))) + 1;
    find("picks").replaceChildren(...Array.from({length: count}, (_, l) => make("button", {type: "button", class: "toggle", "aria-pressed": "false",
      "aria-label": `layer ${l}`, "data-layer": l, onclick: () => { toggle(l); show(); }}, l)));
    show();
  }

  function toggle(layer) {
    if (!picks.delete(layer) && picks.size < size()) picks.add(layer);
  }

  /** The standard error of the difference of two sets' losses. */
  function error(i, j) {
    if (i === j) return 0;
    const [a, b] = i < j ? [i, j] : [j, i], n = world.layers.length;
    return world.errors[a * n - a * (a + 1) / 2 + (b - a - 1)];
  }

  /** A set's standing: its place, the share of other sets that it beats (equals count half), and what the noise leaves of that. */
  function standing(layers) {
    const own = world.place.get(layers), loss = world.loss[own];
    let beats = 0, surely = 0, within = 0;
    world.loss.forEach((other, i) => {
      if (i === own) return;
      const difference = other - loss;
      beats += Math.abs(difference) < 5e-10 ? 0.5 : difference > 0;
      if (Math.abs(difference) <= 2 * error(own, i)) within++;
      else surely += difference > 0;
    });
    const others = world.loss.length - 1;
    return {own, loss, share: beats / others, surely: surely / others, within: within / others};
  }

  const chosen = () => [...picks].sort((a, b) => a - b).join(" ");

  function show() {
    const full = picks.size === size(), own = full ? standing(chosen()) : null;
    for (const button of document.querySelectorAll("#picks button")) {
      const layer = Number(button.dataset.layer), known = revealed && world.known.split(" ").includes(String(layer));
      button.setAttribute("aria-pressed", String(picks.has(layer)));
      button.setAttribute("aria-disabled", String(full && !picks.has(layer)));
      button.classList.toggle("known", known);
      button.setAttribute("aria-label", `layer ${layer}${known ? ", a layer of mathematics" : ""}`);
    }
    find("reveal").textContent = world.known ? "Reveal the layers of mathematics" : "Reveal what the rules pick";
    find("score").textContent = own ? `Layers ${list(chosen().split(" "))} beat ${percent(own.share)} of the other ${world.loss.length - 1} sets.`
      : `Pick ${size()} layers: ${size() - picks.size} to go.`;
    find("score-noise").textContent = own ? `The loss changes by ${signed(own.loss - world.base, 4)} nats a token (the whole vector: `
      + `${signed(world.whole - world.base, 4)}). Two standard errors over ${world.problems} problems tell: ${percent(own.surely)} of the `
      + `sets are worse beyond the noise, and ${percent(own.within)} cannot be told from yours.` : "";
    find("revealed").replaceChildren(...(revealed ? secrets() : []));
    draw(own);
  }

  function secrets() {
    const told = world.known ? [["The layers of mathematics", world.known]] : [];
    told.push(...Object.entries(world.rules).map(([name, layers]) => [titled(name), layers]), ["The best set", world.layers[0]]);
    return told.map(([name, layers]) => make("li", {}, `${name}: layers ${list(layers.split(" "))}, beating ${percent(standing(layers).share)}.`));
  }

  function draw(own) {
    const loss = world.loss.map((x) => x - world.base), low = loss[0], high = loss.at(-1);
    const desc = `${loss.length} sets between ${low.toFixed(4)} and ${high.toFixed(4)} nats a token`
      + (own ? `; yours at ${loss[own.own].toFixed(4)}, better than ${percent(own.share)}.` : ".");
    picture(find("board"), {title: "Every set of layers by change of validation loss", desc, height: 250}, (svg, width, height) => {
      const left = 28, right = width - 28, floor = height - 44, span = high - low || 1;
      const x = scale(low - 0.02 * span, high + 0.02 * span, left, right), cell = width < 500 ? 4 : 6, stack = [];
      const known = revealed && world.known ? world.place.get(world.known) : -1;
      const bins = loss.map((v, i) => {
        const bin = Math.floor(x(v) / cell);
        stack[bin] = (stack[bin] ?? 0) + 1;
        return [bin, stack[bin], i];
      });
      const high_ = Math.min(cell, (floor - 46) / Math.max(...stack.filter(Boolean)));
      for (const [bin, rank, i] of bins) {
        const near = own && i !== own.own && Math.abs(loss[i] - loss[own.own]) <= 2 * error(own.own, i);
        const kind = own && i === own.own ? "yours" : i === known ? "ceiling" : near ? "noise" : "set";
        svg.append(make("rect", {x: bin * cell, y: floor - rank * high_, width: cell - 1, height: Math.max(1, high_ - 1), class: kind}));
      }
      line(svg, left, floor, right, floor, "axis");
      for (const at of Drawing.ticks(x.from, x.to, width < 500 ? 4 : 6)) {
        line(svg, x(at), floor, x(at), floor + 5, "axis");
        text(svg, x(at), floor + 18, at.toFixed(3).replace("-", "−"), {"text-anchor": "middle", class: "small"});
      }
      text(svg, (left + right) / 2, height - 6, "change of loss, nats a token (left is better)", {"text-anchor": "middle", class: "small"});
      const marks = own ? [[x(loss[own.own]), "your set", "yours"]] : [];
      if (known >= 0) marks.push([x(loss[known]), "layers of mathematics", "ceiling"]);
      if (revealed) for (const name of ["stethoscope"]) if (world.rules[name]) marks.push([x(loss[world.place.get(world.rules[name])]), name, "stethoscope"]);
      marks.sort((a, b) => a[0] - b[0]).forEach(([at, words, kind], i) => {
        const y = 14 + 16 * i, end = at > width * 0.6;
        line(svg, at, y + 4, at, floor, `${kind} stroke thin`);
        text(svg, at + (end ? -5 : 5), y + 4, words, {"text-anchor": end ? "end" : "start", class: "label halo"});
      });
    });
  }

  return {open, standing, games: () => games, world: () => world};
})();
