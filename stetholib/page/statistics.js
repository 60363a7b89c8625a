"use strict";
/* The statistics of the ledger, with the names of stetholib/statistics.py and significance.py and the same numbers. */

const Statistics = (() => {
  const {sqrt, abs, exp, log, min, max, PI} = Math;

  /** The upper tail of the standard normal, P(Z > x): a series near 0, a continued fraction further out. */
  function tail(x) {
    if (x < 0) return 1 - tail(-x);
    const density = exp(-x * x / 2) / sqrt(2 * PI);
    if (x < 3) {
      let term = x, sum = x;
      for (let n = 1; term > 1e-18 * sum; n++) sum += term *= x * x / (2 * n + 1);
      return 0.5 - density * sum;
    }
    let fraction = 0;
    for (let n = 200; n > 0; n--) fraction = n / (x + fraction);
    return density / (x + fraction);
  }

  /** The z whose upper tail is p, by Newton's method from a rough first guess. */
  function quantile(p) {
    if (p > 0.5) return -quantile(1 - p);
    const t = sqrt(-2 * log(p));
    let z = t - (2.515517 + 0.802853 * t + 0.010328 * t * t) / (1 + 1.432788 * t + 0.189269 * t * t + 0.001308 * t ** 3);
    for (let step = 0; step < 60; step++) {
      const change = (tail(z) - p) / (exp(-z * z / 2) / sqrt(2 * PI));
      z += change;
      if (abs(change) < 1e-15) break;
    }
    return z;
  }

  const two_sided = (z) => 2 * tail(abs(z));
  const ratio = (difference, error) => error ? difference / error : (difference ? Infinity * Math.sign(difference) : 0);
  const harness_stderr = (correct, n) => n > 1 ? sqrt(correct / n * (1 - correct / n) / (n - 1)) : NaN;

  /** Unpaired z with the harness's standard errors (n - 1), which gives the published +3.41. */
  const harness_z = (base, edited, n) =>
    ratio((edited - base) / n, sqrt(harness_stderr(base, n) ** 2 + harness_stderr(edited, n) ** 2));

  /** The textbook two-proportion test; 0 where all or none are correct. */
  function pooled_z(base, edited, n) {
    const p = (base + edited) / (2 * n);
    return 0 < p && p < 1 ? (edited - base) / n / sqrt(p * (1 - p) * 2 / n) : 0;
  }

  const logs = [0];
  const log_factorial = (n) => {
    for (let i = logs.length; i <= n; i++) logs[i] = logs[i - 1] + log(i);
    return logs[n];
  };

  /** Exact McNemar test: two-sided binomial p of the pairs that changed. */
  function mcnemar(gained, lost) {
    const n = gained + lost;
    if (!n) return 1;
    let p = 0;
    for (let k = 0; k <= min(gained, lost); k++) p += exp(log_factorial(n) - log_factorial(k) - log_factorial(n - k) - n * log(2));
    return min(1, 2 * p);
  }

  /** Holm's step-down correction, in the order given. */
  function holm(values) {
    const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b]), found = [];
    let most = 0;
    order.forEach((at, rank) => found[at] = min(1, most = max(most, values[at] * (values.length - rank))));
    return found;
  }

  /** A root of f between two places where its signs differ, by halving. */
  function root(f, low, high) {
    const rising = f(high) > 0;
    for (let step = 0; step < 200 && high - low > 1e-16; step++) {
      const middle = (low + high) / 2;
      if (f(middle) > 0 === rising) high = middle;
      else low = middle;
    }
    return (low + high) / 2;
  }

  /** Tango's score interval of the paired difference, for few pairs that changed. */
  function score_interval(gained, lost, n, level) {
    const z = quantile(level / 2);
    const low = (gained, lost) => lost === n ? -1 : root((d) => {
      const b = (2 * n - gained + lost) * d - gained - lost, c = lost * d * (1 - d);
      const loss = (sqrt(max(b * b + 8 * n * c, 0)) - b) / (4 * n);
      return gained - lost - n * d - z * sqrt(n * max(2 * loss + d * (1 - d), 0));
    }, -1, (gained - lost) / n - 1e-12);
    return [low(gained, lost), -low(lost, gained)];
  }

  /** A quantile of draws that are known by how often each whole number occurs, from `lowest` on; between two draws linear. */
  function quantile_of(draws, q) {
    const total = draws.counts.reduce((a, b) => a + b, 0), place = q * (total - 1), at = Math.floor(place);
    const value = (index) => {
      let seen = 0;
      for (let i = 0; i < draws.counts.length; i++) if ((seen += draws.counts[i]) > index) return draws.lowest + i;
      return draws.lowest + draws.counts.length - 1;
    };
    return value(at) + (value(min(at + 1, total - 1)) - value(at)) * (place - at);
  }

  /** The smallest paired difference that McNemar's test finds with 80 % power, of so many pairs that change. */
  function minimum_detectable(discordance, n, level, power = 0.8) {
    const za = quantile(level / 2), zb = quantile(1 - power);
    const over = (d, psi) => sqrt(n) * d - za * sqrt(psi) - zb * sqrt(max(psi - d * d, 0));
    if (discordance > 0 && over(discordance, discordance) >= 0) return root((d) => over(d, discordance), 0, discordance);
    return over(1, 1) < 0 ? 1 : root((d) => over(d, d), 1e-12, 1);
  }

  /** The smallest rise above p0 that the harness's unpaired z finds with 80 % power. */
  function minimum_detectable_unpaired(p0, n, level, power = 0.8) {
    const wanted = quantile(level / 2) + quantile(1 - power);
    const over = (d) => sqrt(n - 1) * d - wanted * sqrt(p0 * (1 - p0) + (p0 + d) * max(1 - p0 - d, 0));
    return p0 < 1 - 1e-9 && over(1 - p0) >= 0 ? root(over, 1e-12, 1 - p0) : 1;
  }

  const FEW = 30; // pairs that changed, below which the bootstrap's interval is too narrow

  /** One variant against another on the same problems, of one subject: counts, tests, interval. draws: the bootstrap's own. */
  function compare(y0, y1, level, draws) {
    const n = y0.length;
    let gained = 0, lost = 0, base = 0, edited = 0;
    for (let i = 0; i < n; i++) {
      base += y0[i];
      edited += y1[i];
      gained += y1[i] > y0[i];
      lost += y1[i] < y0[i];
    }
    const [ci_low, ci_high] = gained + lost < FEW ? score_interval(gained, lost, n, level)
      : [level / 2, 1 - level / 2].map((q) => quantile_of(draws, q) / n);
    const z = harness_z(base, edited, n);
    return {
      n, base_accuracy: base / n, accuracy: edited / n, difference: (gained - lost) / n, ci_low, ci_high, z, p: two_sided(z),
      z_pooled: pooled_z(base, edited, n), gained, lost, mcnemar_p: mcnemar(gained, lost),
      mde: minimum_detectable((gained + lost) / n, n, level), mde_unpaired: minimum_detectable_unpaired(base / n, n, level),
    };
  }

  /** improved / degraded (Holm-corrected McNemar), else no worse (interval above -margin), else inconclusive. */
  function verdict(row, margin, level) {
    if (row.mcnemar_p_holm < level && row.difference) return row.difference > 0 ? "improved" : "degraded";
    return row.ci_low > -margin ? "no worse" : "inconclusive";
  }

  return {tail, quantile, two_sided, harness_z, pooled_z, mcnemar, holm, score_interval, quantile_of, minimum_detectable,
    minimum_detectable_unpaired, compare, verdict};
})();
