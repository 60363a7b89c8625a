"use strict";
/* Begin: read the data in the page, and bring its four parts to life. */

const Start = (() => {
  const WORDS = {"consistent": "good", "improved": "good", "contradicted": "bad", "degraded": "bad"};
  const knobs = () => ({level: Number(find("level").value), overall: Number(find("margin").value) / 100, subject: Number(find("margin-subject").value) / 100});
  const cell = (words, kind) => make("td", kind ? {class: kind} : {}, words);
  const small = (p) => p >= 0.001 ? p.toFixed(3) : p === 0 ? "0" : p.toExponential(0).replace("e-", " · 10⁻").replace(/\d+$/, (d) => [...d].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join(""));

  function ledger(data) {
    const m = data.ledger.margins, subjects = Ledger.subjects();
    find("ledger-subject").append(...[Ledger.ALL, ...subjects].map((s) => make("option", {value: s, selected: s === data.profile.headline}, s === "all" ? "All subjects" : titled(s))));
    find("metric").append(...Ledger.metrics().map((s) => make("option", {value: s}, titled(s))));
    find("level").value = m.level;
    find("margin").value = 100 * m.overall;
    find("margin-subject").value = 100 * m.subject;
    for (const id of ["ledger-subject", "metric", "level", "margin", "margin-subject"]) find(id).addEventListener("input", () => show(data));
    show(data);
  }

  function show(data) {
    const k = knobs(), subject = find("ledger-subject").value, metric = find("metric").value;
    find("level-said").textContent = k.level.toFixed(3).replace(/0$/, "");
    find("margin-said").textContent = `${signed(100 * k.overall, 1).slice(1)} points`;
    find("margin-subject-said").textContent = `${signed(100 * k.subject, 1).slice(1)} points`;
    const names = data.ledger.variants.filter((name) => name !== "base");
    find("tests").replaceChildren(...names.map((name) => {
      const row = Ledger.rows(name, metric, k)[subject];
      return make("tr", {}, make("th", {scope: "row"}, called(name)), cell(percent(row.base_accuracy)), cell(percent(row.accuracy)),
        cell(`${signed(100 * row.difference)} (${signed(100 * row.ci_low)} to ${signed(100 * row.ci_high)})`),
        cell(signed(row.z, 2)), cell(signed(row.z_pooled, 2)), cell(`${row.gained} / ${row.lost}`), cell(small(row.mcnemar_p)),
        cell(small(row.mcnemar_p_holm)), cell(row.verdict, WORDS[row.verdict] ?? "open"));
    }));
    const headline = subject === Ledger.ALL ? data.profile.headline : subject;
    const claims = Ledger.claims(k, headline);
    find("claims").replaceChildren(...claims.map((one) => make("tr", {},
      make("th", {scope: "row"}, one.claim + (one.contrast === "matched" ? " (matched words)" : "")),
      cell(one.statement + (["C4", "C5"].includes(one.claim) && headline !== "number_theory" ? ` [here: ${titled(headline)}]` : "")),
      cell(one.published), cell(one.measured), cell(one.verdict, WORDS[one.verdict] ?? "open"), cell(one.strict, WORDS[one.strict] ?? "open"))));
    const changed = claims.filter((one, i) => one.verdict !== data.ledger.claims[i].verdict || one.strict !== data.ledger.claims[i].verdict_strict);
    find("changed").textContent = changed.length ? `With these settings ${changed.length} of ${claims.length} rows are judged otherwise than in `
      + `the ledger that was fixed before any result: ${list([...new Set(changed.map((one) => one.claim))])}.`
      : "These are the verdicts of the ledger, whose level and margins were fixed before any result.";
  }

  function start() {
    const data = JSON.parse(find("data").textContent), root = document.documentElement.style;
    for (const [name, colour] of Object.entries(data.palette)) root.setProperty(`--${name}`, colour);
    find("whose").textContent = `All numbers on this page are ours, ${data.profile.title} (profile ${data.profile.name}, seed ${data.profile.seed}), `
      + "unless they say that they are the paper's.";
    Ledger.open(data.ledger, data.problems);
    Live.open(data);
    Story.tell(data);
    Game.open(data);
    ledger(data);
    document.documentElement.dataset.ready = "yes";
    return data;
  }

  return {start};
})();

const DATA = Start.start();
