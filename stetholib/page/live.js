"use strict";
/* The miniature, run in this very page: the base and an edited model answer a problem side by side. */

const Live = (() => {
  let data, base, vector, scalpel, tokenizer, energies, busy = 0;
  const state = {layers: new Set(), alpha: 1, vector: "raw"};
  const config = () => data.model.config;
  const layers = () => config().layer_types.map((_, l) => l);
  const prompt = (problem) => `Problem:\n${problem}\n\nSolution:`;

  function open(given) {
    data = given;
    base = Gemma.unpack(Gemma.numbers(data.model.weights), data.model.shapes);
    vector = Gemma.unpack(Gemma.numbers(data.model.vector), data.model.changed);
    tokenizer = new Gemma.Tokenizer(data.model.tokenizer);
    show();
  }

  /** The vector that an edit adds: raw as it is; projected is computed once, from the scalpel's subspaces. */
  function source(name) {
    if (name === "raw") return vector;
    const bases = Object.fromEntries(Object.entries(data.scalpel).map(([l, text]) => [l, Gemma.numbers(text, Float64Array)]));
    return scalpel ??= Gemma.projected(vector, bases, config().hidden_size);
  }

  /** The weights of an edit: {vector, layers, alpha}. */
  const weights = (edit) => Gemma.edited(base, source(edit.vector), edit.layers, edit.alpha);

  /** A whole answer at once; for tests, and for the exam. */
  const complete = (edited, problem) => Gemma.completion(config(), edited, tokenizer, prompt(problem), data.limits);

  const current = () => ({vector: state.vector, layers: [...state.layers].sort((a, b) => a - b), alpha: state.alpha});

  function energy(edit) {
    energies ??= {};
    const of = energies[edit.vector] ??= layers().map((l) => sum(Object.entries(source(edit.vector))
      .filter(([name]) => Number(name.split(".")[1]) === l).map(([, delta]) => delta.reduce((a, x) => a + x * x, 0))));
    const whole = sum((energies.raw ??= layers().map((l) => sum(Object.entries(vector)
      .filter(([name]) => Number(name.split(".")[1]) === l).map(([, delta]) => delta.reduce((a, x) => a + x * x, 0))))));
    return edit.alpha ** 2 * sum(edit.layers.map((l) => of[l])) / whole;
  }

  function show() {
    find("layers").replaceChildren(...layers().map((l) => make("button", {type: "button", class: "toggle", "aria-pressed": "false",
      "aria-label": `layer ${l}`, "data-layer": l, onclick: () => { state.layers.has(l) ? state.layers.delete(l) : state.layers.add(l); update(); }}, l)));
    find("presets").replaceChildren(...data.edits.map((edit) => make("button", {type: "button", class: "quiet", onclick: () => {
      Object.assign(state, {layers: new Set(edit.layers), alpha: edit.alpha, vector: edit.vector});
      update();
    }}, called(edit.name))));
    find("alpha").addEventListener("input", (event) => { state.alpha = Number(event.target.value); update(); });
    for (const radio of document.querySelectorAll("input[name=vector]")) {
      radio.addEventListener("change", () => { state.vector = radio.value; update(); });
    }
    const subjects = [...new Set(data.problems.map((p) => p.subject))].sort();
    find("subject").append(...subjects.map((s) => make("option", {value: s, selected: s === data.profile.headline}, titled(s))));
    find("subject").addEventListener("change", () => pick(telling()));
    find("draw").addEventListener("click", () => pick());
    find("ask").addEventListener("click", ask);
    find("exam").addEventListener("click", exam);
    find("problem").addEventListener("input", () => { find("gold").value = ""; find("worked").textContent = ""; });
    Object.assign(state, {layers: new Set((data.edits.find((e) => e.name === "stethoscope") ?? data.edits.at(-1)).layers)});
    update();
    pick(telling());
  }

  function update() {
    for (const button of document.querySelectorAll("#layers button")) {
      button.setAttribute("aria-pressed", String(state.layers.has(Number(button.dataset.layer))));
    }
    find("alpha").value = state.alpha;
    find("alpha-said").textContent = state.alpha.toFixed(2);
    find(`vector-${state.vector}`).checked = true;
    const edit = current();
    const where = edit.layers.length === layers().length ? "all layers" : edit.layers.length ? `layers ${list(edit.layers.map(String))}` : "no layer";
    const board = data.games.at(-1), place = state.vector === "raw" && state.alpha === 1 ? board.layers.indexOf(edit.layers.join(" ")) : -1;
    find("edit-said").textContent = `The edited model is the base plus ${state.alpha.toFixed(2)} times the ${state.vector} vector in `
      + `${where}: ${percent(energy(edit))} of the whole vector's energy.`
      + (place < 0 ? "" : ` By validation loss this set takes place ${place + 1} of all ${board.layers.length} of its size.`);
    for (const id of ["answer-edited", "verdict-edited"]) find(id).textContent = "";
    find("exam-said").textContent = "";
    busy++;
  }

  /** Where a problem of the subject stands that the stethoscope's model solved in the study and the base did not; else the first. */
  function telling() {
    const [before, after] = ["base", "stethoscope"].map((name) => Ledger.of(name, Ledger.metrics()[0], find("subject").value));
    return Math.max(0, before.findIndex((right, i) => !right && after[i]));
  }

  function pick(index) {
    const some = data.problems.filter((p) => p.subject === find("subject").value);
    const one = some[index ?? Math.floor(Math.random() * some.length)];
    find("problem").value = one.problem;
    find("gold").value = one.answer;
    find("worked").textContent = `${one.level}. A worked solution: ${one.solution}`;
    for (const id of ["answer-base", "answer-edited", "verdict-base", "verdict-edited"]) find(id).textContent = "";
    busy++;
  }

  const pause = () => new Promise((go) => requestAnimationFrame(go));

  async function ask() {
    const mine = ++busy, gold = find("gold").value, problem = find("problem").value;
    const sides = [["base", base], ["edited", weights(current())]].map(([name, w]) => {
      find(`answer-${name}`).textContent = "";
      find(`verdict-${name}`).textContent = "";
      return {name, text: "", tokens: [], steps: Gemma.answer(config(), w, tokenizer, prompt(problem), data.limits)};
    });
    await pause();
    let waiting = sides.slice();
    while (waiting.length) {
      const started = performance.now();
      while (waiting.length && performance.now() - started < 12) waiting = waiting.filter(step);
      await pause();
      if (mine !== busy) return;
    }
    for (const side of sides) conclude(side, gold);
  }

  /** One more token of an answer; false where it has ended. */
  function step(side) {
    const {value, done} = side.steps.next();
    if (done) return false;
    const sure = value.probability >= 0.6;
    const node = make("span", {class: sure ? "token" : "token unsure", title: `probability ${percent(value.probability, 0)}`}, side.text ? value.piece : value.piece.trimStart());
    side.tokens.push({node, from: side.text.length, to: side.text.length + value.piece.length});
    side.text += value.piece;
    find(`answer-${side.name}`).append(node);
    return true;
  }

  /** The verdict, and the very words that made it marked in the answer. */
  function conclude(side, gold) {
    const found = Scoring.judge(side.text, gold), place = find(`verdict-${side.name}`);
    const mark = (span, kind) => span && side.tokens.filter((t) => t.from < span.to && t.to > span.from).forEach((t) => t.node.classList.add(kind));
    mark(found.box, "boxed");
    mark(found.closing, found.right ? "right" : "wrong");
    if (!gold) return place.replaceChildren(found.closing ? `It answers ${found.extracted}. This problem's answer is not known here.` : "It gives no closing sentence.");
    if (found.right) return place.replaceChildren(make("strong", {}, "Right. "), `The closing sentence says ${found.extracted}, and the answer is ${Scoring.normalized(gold)}.`);
    const why = found.closing ? `The closing sentence says ${found.extracted || "nothing"}, but the answer is ${Scoring.normalized(gold)}.`
      : "There is no closing sentence, so exact match finds nothing to read" + (found.boxRight ? `, although the box holds the answer, ${Scoring.normalized(gold)}.` : ".");
    place.replaceChildren(make("strong", {}, "Wrong. "), why);
  }

  async function exam() {
    const mine = ++busy, some = data.problems.filter((p) => p.subject === find("subject").value), edited = weights(current());
    const asked = [...some].map((one) => [Math.random(), one]).sort((a, b) => a[0] - b[0]).slice(0, 20).map(([, one]) => one);
    const right = {base: 0, edited: 0, gained: 0, lost: 0};
    for (const [i, one] of asked.entries()) {
      const [b, e] = [base, edited].map((w) => Scoring.judge(complete(w, one.problem).text, one.answer).right);
      right.base += b;
      right.edited += e;
      right.gained += e && !b;
      right.lost += b && !e;
      find("exam-said").textContent = `${i + 1} of ${asked.length} asked: the base ${right.base} right, the edited model ${right.edited}.`;
      await pause();
      if (mine !== busy) return;
    }
    const p = Statistics.mcnemar(right.gained, right.lost);
    find("exam-said").textContent += ` ${right.gained} gained, ${right.lost} lost; McNemar's exact p = ${p.toPrecision(2)}`
      + `${p < 0.05 ? "." : ", so these few problems cannot tell the two models apart."}`;
  }

  return {open, complete, weights, current, state, update};
})();
