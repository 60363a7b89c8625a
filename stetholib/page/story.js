"use strict";
/* The story in five pictures, each with the sentence that it shows; every number is computed from the tables in the page. */

const Story = (() => {
  const {picture, scale, text, line, axes, path, dot, labels} = Drawing;

  function tell(data) {
    const s = data.story, layers = s.energy.map((row) => row.layer), row = {};
    for (const one of s.sets) if (!(one.selector in row)) row[one.selector] = one;
    const chosen = row.stethoscope.layers.split(" ").map(Number);
    const variants = Object.fromEntries(data.edits.map((one) => [one.name, one]));
    whole(s, layers, chosen);
    scalpel(s, layers, data);
    scores(s, layers, chosen);
    chance(s, row);
    accuracy(data, variants);
  }

  function frame(width, height, right, left = 48) {
    return {left, right: width - right, top: 14, bottom: height - 46};
  }

  /** One: what the fine-tune changed, by layer. */
  function whole(s, layers, chosen) {
    const total = s.energy.map((row) => row.reader + row.writer), even = 1 / layers.length, most = Math.max(...total);
    const top = total.indexOf(most), readers = sum(s.energy.map((row) => row.reader));
    find("says-1").textContent = `A fine-tune changes weights; the change is called the task vector. Here it is spread over all `
      + `${layers.length} layers: layer ${top} holds the most of its energy, ${percent(most)}, where an equal share would be `
      + `${percent(even)}. ${percent(readers, 0)} of it lies in matrices that read the residual stream.`;
    const desc = `Bars by layer: ${total.map((x, i) => `layer ${layers[i]} ${percent(x)}`).join(", ")}.`;
    picture(find("picture-1"), {title: "Energy of the task vector by layer", desc, height: 250}, (svg, width, height) => {
      const f = frame(width, height, 106), step = (f.right - f.left) / layers.length;
      const x = scale(-0.5, layers.length - 0.5, f.left, f.right), y = scale(0, most * 1.12, f.bottom, f.top);
      axes(svg, x, y, layers, "layer", (v) => percent(v, 0));
      layers.forEach((layer, i) => {
        const cut = y(s.energy[i].reader), wide = step * 0.62, from = x(layer) - wide / 2;
        svg.append(make("rect", {x: from, y: cut, width: wide, height: f.bottom - cut, class: "whole"}));
        svg.append(make("rect", {x: from, y: y(total[i]), width: wide, height: cut - y(total[i]), class: "whole light"}));
      });
      line(svg, f.left, y(even), f.right, y(even), "chance dashed");
      labels(svg, f.right, [{y: y(even), kind: "chance", words: "equal share"}]);
      text(svg, f.left + 2, f.top + 2, width < 500 ? "dark: readers; light: writers" : "dark: matrices that read the stream; light: that write to it", {class: "small halo"});
    });
  }

  /** Two: what the scalpel keeps, beside chance and the best that could be kept. */
  function scalpel(s, layers, data) {
    const all = s.kept_of_all;
    find("says-2").textContent = `The scalpel keeps only what of the vector lies along ${s.rank} directions of ${s.width}, those of `
      + `the features most specific to mathematics. That is ${percent(all.retained)} of its energy; ${s.rank} random directions keep `
      + `${percent(all.chance)}, the best ${s.rank} a layer ${percent(all.ceiling)}. So ${percent(1 - all.ceiling)} is lost because the `
      + `directions are so few, and ${percent(all.ceiling - all.retained)} more because these point elsewhere.`;
    const desc = s.kept.map((r) => `layer ${r.layer}: ${percent(r.retained)}, chance ${percent(r.chance)}, best ${percent(r.ceiling)}`).join("; ");
    picture(find("picture-2"), {title: "Share of energy that the scalpel keeps, by layer", desc, height: 260}, (svg, width, height) => {
      const f = frame(width, height, 118), x = scale(s.kept[0].layer, s.kept.at(-1).layer, f.left + 14, f.right - 8);
      const y = scale(0, 1.1 * Math.max(...s.kept.map((r) => r.ceiling)), f.bottom, f.top);
      axes(svg, x, y, s.kept.map((r) => r.layer), "layer", (v) => percent(v, 0));
      const lines = [["ceiling", "ceiling", "best possible"], ["retained", "scalpel", "scalpel"], ["chance", "chance", "random"]];
      for (const [column, kind] of lines) {
        path(svg, s.kept.map((r) => [x(r.layer), y(r[column])]), `${kind} stroke${kind === "chance" ? " dashed" : ""}`);
        if (kind !== "chance") for (const r of s.kept) dot(svg, x(r.layer), y(r[column]), 3.5, kind);
      }
      labels(svg, f.right, lines.map(([column, kind, words]) => ({y: y(s.kept.at(-1)[column]), kind, words})));
    });
  }

  /** Three: the scores by which the stethoscope picks layers, and what a random dictionary would say. */
  function scores(s, layers, chosen) {
    const rows = s.scores.filter((r) => r.contrast === "corpus"), above = rows.filter((r) => r.score > r.score_random).length;
    const picked = rows.filter((r) => r.selected);
    const mean = (some, column) => (sum(some.map((r) => r[column] ?? 0)) / some.filter((r) => r[column] !== null).length).toFixed(2);
    find("says-3").textContent = `The stethoscope only listens: it scores each layer by how specific its most specific features are `
      + `to mathematics, and picks layers ${list(chosen.map(String))}. A random dictionary of the same shape, which has learnt nothing, `
      + `scores ${mean(rows, "score_random")} on average where the SAE scores ${mean(rows, "score")}; the SAE's score is the higher one `
      + `in ${above} of ${rows.length} layers, and in ${picked.filter((r) => r.score > r.score_random).length} of the ${picked.length} `
      + `that are picked.`;
    const desc = rows.map((r) => `layer ${r.layer}: ${r.score?.toFixed(2)}, random ${r.score_random?.toFixed(2)}${r.selected ? ", picked" : ""}`).join("; ");
    picture(find("picture-3"), {title: "Layer scores of the SAE and of a random dictionary", desc, height: 260}, (svg, width, height) => {
      const f = frame(width, height, 92), values = rows.flatMap((r) => [r.score, r.score_random]).filter((v) => v !== null);
      const x = scale(rows[0].layer, rows.at(-1).layer, f.left + 14, f.right - 8);
      const y = scale(Math.min(0, ...values), 1.1 * Math.max(...values), f.bottom, f.top);
      axes(svg, x, y, rows.map((r) => r.layer), "layer", (v) => v.toFixed(1));
      path(svg, rows.filter((r) => r.score_random !== null).map((r) => [x(r.layer), y(r.score_random)]), "chance stroke dashed");
      path(svg, rows.filter((r) => r.score !== null).map((r) => [x(r.layer), y(r.score)]), "stethoscope stroke");
      for (const r of rows) if (r.score !== null) dot(svg, x(r.layer), y(r.score), r.selected ? 6 : 3, r.selected ? "stethoscope" : "stethoscope hollow");
      const last = rows.at(-1);
      labels(svg, f.right, [{y: y(last.score ?? 0), kind: "stethoscope", words: "SAE"},
        {y: y(last.score_random ?? 0), kind: "chance", words: "random"}]);
      text(svg, f.left + 8, f.top + 2, "large dots: picked", {class: "small halo"});
    });
  }

  /** Four: the validation loss of the picked layers among random sets. */
  function chance(s, row) {
    const random = s.sets.filter((one) => one.selector === "random").map((one) => one.loss_change), own = row.stethoscope;
    find("says-4").textContent = `Would chance have done as well? With the raw vector in the stethoscope's layers, the loss of `
      + `solutions changes by ${signed(own.loss_change, 4)} nats a token. That beats ${percent(own.percentile)} of ${random.length} random `
      + `sets of as many layers (${percent(own.percentile_low)} to ${percent(own.percentile_high)}); chance is 50 %. The whole vector, `
      + `shrunk to the same energy, changes it by ${signed(row.full_shrunk.loss_change, 4)}.`;
    const marks = [["stethoscope", "stethoscope", own.loss_change], ["shrunk", "whole vector, shrunk", row.full_shrunk.loss_change]];
    const desc = `${random.length} random sets between ${Math.min(...random).toFixed(4)} and ${Math.max(...random).toFixed(4)}; `
      + marks.map(([, words, v]) => `${words} ${v.toFixed(4)}`).join("; ");
    picture(find("picture-4"), {title: "Change of validation loss by sets of layers", desc, height: 210}, (svg, width, height) => {
      const f = frame(width, height, 28, 28), values = [...random, ...marks.map((m) => m[2])], pad = 0.06 * (Math.max(...values) - Math.min(...values) || 1);
      const x = scale(Math.min(...values) - pad, Math.max(...values) + pad, f.left, f.right), floor = f.bottom - 4;
      for (const at of Drawing.ticks(x.from, x.to, width < 500 ? 3 : 6)) {
        line(svg, x(at), floor, x(at), floor + 5, "axis");
        text(svg, x(at), floor + 18, at.toFixed(3).replace("-", "−"), {"text-anchor": "middle", class: "small"});
      }
      line(svg, f.left, floor, f.right, floor, "axis");
      text(svg, (f.left + f.right) / 2, floor + 38, "change of loss, nats a token (left is better)", {"text-anchor": "middle", class: "small"});
      const stack = {}, wide = 8;
      for (const v of [...random].sort((a, b) => a - b)) {
        const bin = Math.round(x(v) / wide);
        stack[bin] = (stack[bin] ?? 0) + 1;
        dot(svg, bin * wide, floor - stack[bin] * 7 + 2, 3.2, "chance");
      }
      const places = marks.map(([kind, words, v]) => ({kind, words, at: x(v)})).sort((a, b) => a.at - b.at);
      places.forEach((one, i) => {
        const high = f.top + 8 + 18 * i, end = one.at > width * 0.6;
        line(svg, one.at, high + 4, one.at, floor, `${one.kind} stroke`);
        text(svg, one.at + (end ? -4 : 4), high + 6, one.words, {"text-anchor": end ? "end" : "start", class: "label halo"});
      });
    });
  }

  const SHOWN = [["base", "base", "base"], ["scalpel", "scalpel", "scalpel"], ["stethoscope", "stethoscope", "stethoscope"],
    ["full_shrunk", "shrunk", "whole vector, shrunk"], ["full", "whole", "whole vector"]];

  /** Five: accuracies, of a subject that the reader picks. */
  function accuracy(data, variants) {
    const rows = data.story.accuracy, subjects = [...new Set(rows.map((r) => r.subject))].sort(), choose = find("accuracy-subject");
    choose.append(...subjects.map((s) => make("option", {value: s, selected: s === data.profile.headline}, s === "all" ? "All subjects" : titled(s))));
    const show = () => {
      const subject = choose.value, of = (name) => rows.find((r) => r.variant === name && r.subject === subject);
      const random = rows.filter((r) => r.variant.startsWith("random_") && r.subject === subject).map((r) => r.accuracy);
      const shown = SHOWN.filter(([name]) => of(name)), told = (name) => percent(of(name).accuracy);
      const called = subject === "all" ? "over all subjects" : `in ${titled(subject)}`;
      const ahead = random.filter((r) => r < of("stethoscope").accuracy).length;
      find("says-5").textContent = `By exact match ${called}, the base gets ${told("base")} right, the scalpel ${told("scalpel")}, the `
        + `stethoscope ${told("stethoscope")}, the whole vector ${told("full")}. The stethoscope is ahead of ${ahead} of `
        + `${random.length} random ${random.length === 1 ? "set" : "sets"} of layers; the whole vector, shrunk to its energy, gets ${told("full_shrunk")}.`;
      const desc = shown.map(([name, , words]) => `${words} ${told(name)}`).join(", ") + `; random sets ${random.map((r) => percent(r)).join(", ")}.`;
      picture(find("picture-5"), {title: `Accuracy ${called}`, desc, height: 60 + 34 * shown.length}, (svg, width, height) => {
        const left = width < 500 ? 108 : 168, right = width - 62, bottom = height - 40, top = 16;
        const most = Math.max(0.05, ...shown.map(([name]) => of(name).accuracy + 2 * (of(name).stderr ?? 0)), ...random);
        const x = scale(0, Math.min(1, 1.08 * most), left, right);
        for (const at of Drawing.ticks(0, x.to, width < 500 ? 3 : 6)) {
          line(svg, x(at), top - 8, x(at), bottom, "grid");
          text(svg, x(at), bottom + 16, percent(at, 0), {"text-anchor": "middle", class: "small"});
        }
        text(svg, (left + right) / 2, bottom + 34, "answered correctly (95 % interval)", {"text-anchor": "middle", class: "small"});
        if (random.length) {
          const [low, high] = [Math.min(...random), Math.max(...random)];
          svg.append(make("rect", {x: x(low) - 3, y: top - 8, width: x(high) - x(low) + 6, height: bottom - top + 8, class: "chance band"}));
          text(svg, x((low + high) / 2), top + 2, "random sets", {"text-anchor": "middle", class: "small halo"});
        }
        shown.forEach(([name, kind, words], i) => {
          const r = of(name), y = top + 22 + 34 * i, half = 1.96 * (r.stderr ?? 0);
          text(svg, left - 10, y + 4, width < 500 ? words.replace("whole vector, ", "") : words, {"text-anchor": "end", class: "label"});
          line(svg, x(Math.max(0, r.accuracy - half)), y, x(Math.min(x.to, r.accuracy + half)), y, `${kind} stroke`);
          dot(svg, x(r.accuracy), y, 6, kind);
          text(svg, right + 6, y + 4, percent(r.accuracy), {class: "label"});
        });
      });
    };
    choose.addEventListener("change", show);
    show();
  }

  return {tell};
})();
