"use strict";
/* The ledger, recomputed from each answer's outcome: tests of every variant against the base, and the verdicts on the claims that
   hang on a level or a margin. The rules are those of stetholib/claims.py. */

const Ledger = (() => {
  const ALL = "all", FLOOR = 0.05, SHARE = 5 / 7, DETECTABLE = 0.1, CARRIED = 0.95;
  let data, problems, subjects, outcomes, kept;

  function open(ledger, rows) {
    [data, problems, kept] = [ledger, rows, new Map()];
    subjects = [...new Set(rows.map((row) => row.subject))].sort();
    outcomes = {};
    for (const [metric, variants] of Object.entries(ledger.outcomes)) {
      outcomes[metric] = {};
      for (const [name, packed] of Object.entries(variants)) {
        const bytes = Gemma.numbers(packed, Uint8Array);
        outcomes[metric][name] = Uint8Array.from(rows, (_, i) => bytes[i >> 3] >> (i & 7) & 1);
      }
    }
  }

  const metrics = () => Object.keys(outcomes);
  const of = (name, metric, subject) => outcomes[metric][name].filter((_, i) => subject === ALL || problems[i].subject === subject);

  /** One variant against another by one metric: a row for each subject, and `all`, which stands outside Holm's family. */
  function rows(variant, metric, knobs, against = "base") {
    const {level, overall, subject: margin} = knobs, key = JSON.stringify([variant, metric, against, level, overall, margin]);
    if (!kept.has(key)) {
      const found = {};
      for (const subject of [ALL, ...subjects]) {
        const draws = data.draws[`${metric}/${variant}/${against}/${subject}`];
        found[subject] = Statistics.compare(of(against, metric, subject), of(variant, metric, subject), level, draws);
        found[subject].mcnemar_p_holm = found[subject].mcnemar_p;
      }
      Statistics.holm(subjects.map((one) => found[one].mcnemar_p)).forEach((p, i) => found[subjects[i]].mcnemar_p_holm = p);
      for (const [subject, row] of Object.entries(found)) {
        row.margin = subject === ALL ? overall : margin;
        row.verdict = Statistics.verdict(row, row.margin, level);
      }
      if (kept.size > 400) kept.clear();
      kept.set(key, found);
    }
    return kept.get(key);
  }

  /** The verdicts on all claims. headline: the subject that C4 and C5 speak of, Number Theory in the paper. */
  function claims(knobs, headline) {
    const usual = {metric: "exact_match", detectable: "mde_unpaired"};
    const strict = outcomes.math_verify ? {metric: "math_verify", detectable: "mde"} : {metric: "exact_match", detectable: "mde"};
    const of = (variant, by, against) => rows(variant, by.metric, knobs, against);
    const counting = (by) => subjects.filter((s) => {
      const row = of("full", by)[s];
      return row.ci_low > 0 && row.difference >= row[by.detectable] && row.base_accuracy >= FLOOR;
    });
    const improved = (row, by) => by === usual ? row.p < knobs.level && row.difference > 0 : row.verdict === "improved";
    const enough = (count) => count >= SHARE * subjects.length;
    const counts = {usual: counting(usual), strict: counting(strict)};
    const where = (counted, holds) => counted.includes(headline) ? holds : null;
    const points = (x) => `${x < 0 ? "−" : "+"}${Math.abs(100 * x).toFixed(1)} points`;
    const judges = {
      C2() {
        const contained = (by, counted) => {
          const found = counted.map((s) => of("scalpel", by)[s]), rise = found.filter((row) => improved(row, by)).length;
          const below = found.every((row) => row.ci_high < row.margin);
          return enough(counted.length) ? (rise ? false : below || null) : null;
        };
        const lost = data.carried < CARRIED;
        const rise = subjects.filter((s) => improved(of("scalpel", usual)[s], usual)).length;
        return [lost ? null : contained(usual, counts.usual), lost ? null : contained(strict, counts.strict),
          `${rise} of ${subjects.length} subjects improved by the scalpel; ${counts.usual.length} can be tested`];
      },
      C4(variant) {
        const [one, other] = [usual, strict].map((by) => of(variant, by)[headline]);
        const shrunk = of(variant, strict, "full_shrunk")[headline];
        const beats = other.ci_low > 0 && shrunk.ci_low > 0 && data.percentile_low[variant] >= 0.95;
        return [where(counts.usual, one.ci_low > 0), data.tells_apart ? where(counts.strict, beats) : null,
          `${points(one.difference)}, and ${points(shrunk.difference)} against the whole vector at its energy`];
      },
      C5(variant) {
        const [one, other] = [usual, strict].map((by) => of(variant, by)[headline]);
        return [where(counts.usual, improved(one, usual)), where(counts.strict, improved(other, strict)),
          `z = ${one.z.toFixed(2)}; paired, Holm-corrected p = ${other.mcnemar_p_holm.toPrecision(2)}`];
      },
      C6(variant) {
        const [one, other] = [usual, strict].map((by) => subjects.filter((s) => improved(of(variant, by)[s], by)).length);
        const beats = of(variant, strict, "full_shrunk")[ALL].ci_low > 0;
        return [enough(counts.usual.length) ? enough(one) : null, enough(counts.strict.length) ? enough(other) && beats : null,
          `${one} of ${subjects.length} improved; ${other} paired and corrected`];
      },
      C7(variant) {
        const found = [...new Set([usual.metric, strict.metric])].map((metric) => rows(variant, metric, knobs));
        const own = subjects.map((s) => found[0][s]), verdicts = found.flatMap((one) => subjects.map((s) => one[s].verdict));
        const worse = own.filter((row) => row.p < knobs.level && row.difference < 0).length;
        const safe = verdicts.every((word) => word === "improved" || word === "no worse");
        const above = own.filter((row) => row.base_accuracy >= FLOOR);
        const telling = above.filter((row) => row.mde_unpaired <= DETECTABLE).length;
        return [worse ? false : enough(telling) || null,
          verdicts.includes("degraded") ? false : (safe && enough(above.length)) || null, `${worse} of ${subjects.length} degraded`];
      },
    };
    const word = (holds) => holds === null ? "not testable" : holds ? "consistent" : "contradicted";
    return data.claims.map((claim) => {
      const found = {claim: claim.claim, contrast: claim.contrast, statement: claim.statement, published: claim.published};
      if (!judges[claim.claim]) return {...found, verdict: claim.verdict, strict: claim.verdict_strict, measured: claim.measured, fixed: true};
      const matched = claim.contrast === "matched";
      const [holds, strictly, measured] = judges[claim.claim](matched ? "stethoscope_matched" : "stethoscope");
      if (matched && data.same_layers) return {...found, verdict: "as corpus", strict: "as corpus", measured};
      return {...found, verdict: word(holds), strict: word(strictly), measured};
    });
  }

  return {open, rows, claims, metrics, of, subjects: () => subjects, ALL};
})();
