"use strict";
/* How an answer is read and judged: Minerva Math's rules, as lm-evaluation-harness has them (exact match), for answers that are
   whole numbers, decimals or fractions. What the harness hands to sympy beyond those, such as "2x + 2x", counts as different here. */

const Scoring = (() => {
  const INVALID = "[invalidanswer]";
  const SENTENCE = /Final Answer: The final answer is(.*?). I hope it is correct./;
  const SUBSTITUTIONS = [["an ", ""], ["a ", ""], [".$", "$"], ["\\$", ""], ["\\ ", ""], [" ", ""], ["mbox", "text"],
    [",\\text{and}", ","], ["\\text{and}", ","], ["\\text{m}", "\\text{}"]];
  const REMOVED = ["square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students", "childrentickets",
    "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}",
    "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"];
  const isWord = (text) => /^[a-z]+$/.test(text);

  /** The answer in the closing sentence, and where in the text it stands; null where there is none. */
  function closing(text) {
    const match = SENTENCE.exec(text + "I hope it is correct.");
    return match && {answer: match[1].trim(), from: match.index, to: Math.min(text.length, match.index + match[0].length)};
  }

  /** Lewkowycz et al. (2022), appendix D: one spelling for answers that are written differently. */
  function normalized(answer) {
    let text = answer.split("=").at(-1);
    for (const word of REMOVED.filter(isWord)) text = text.replace(new RegExp(`(?<!\\\\)\\b${word}\\b`, "g"), "");
    for (const [before, after] of SUBSTITUTIONS) text = text.replaceAll(before, after);
    for (const word of REMOVED) {
      if (isWord(word)) text = text.split(/(\\[a-zA-Z]+)/).map((part, i) => i % 2 ? part : part.replaceAll(word, "")).join("");
      else text = text.replaceAll(word, "");
    }
    text = text.replace(/(.*?)(\$)(.*?)(\$)(.*)/g, "$$$3$$");
    for (const command of ["text", "textbf", "overline"]) text = text.replace(new RegExp(`(\\\\${command}\\{)(.*?)(\\})`, "g"), "$2");
    text = text.replace(/(\\boxed\{)(.*)(\})/g, "$2");
    text = text.replace(/(frac)([^{])(.)/g, "frac{$2}{$3}");
    text = text.replace(/(sqrt)(\[[^\]]*\])(\w)/g, "$1$2{$3}");
    text = text.replace(/(sqrt)(?!\[)([^{])/g, "sqrt{$2}").replaceAll("$", "");
    return /^-?\d{1,3}(,\d{3})+$/.test(text) ? text.replaceAll(",", "") : text;
  }

  /** A whole number, decimal or fraction as [numerator, denominator]; null for all else, as for 041, which sympy refuses too. */
  function fraction(text) {
    const match = /^(-?)(?:(0+|[1-9]\d*)|(\d+)\.(\d+)|\\frac\{(-?(?:0+|[1-9]\d*))\}\{(-?(?:0+|[1-9]\d*))\})$/.exec(text);
    if (!match) return null;
    const [, minus, whole, before, after, above, below] = match, sign = minus ? -1n : 1n;
    if (whole !== undefined) return [sign * BigInt(whole), 1n];
    if (before !== undefined) return [sign * BigInt(before + after), 10n ** BigInt(after.length)];
    return BigInt(below) ? [sign * BigInt(above), BigInt(below)] : null;
  }

  /** Whether two normalised answers are the same number, or the same text. */
  function same(one, other) {
    if (one && one === other) return true;
    const [a, b] = [fraction(one), fraction(other)];
    return Boolean(a && b && a[0] * b[1] === b[0] * a[1]);
  }

  /** What stands in the last \boxed{...}, and where; null without one. */
  function boxed(text) {
    const from = text.lastIndexOf("\\boxed{");
    let depth = 0;
    for (let i = from + 6; from >= 0 && i < text.length; i++) {
      depth += (text[i] === "{") - (text[i] === "}");
      if (!depth) return {answer: text.slice(from + 7, i), from, to: i + 1};
    }
    return null;
  }

  /** Exact match of a completion with the gold answer, what was read, and what stands in its last box. */
  function judge(text, gold) {
    const found = closing(text), box = boxed(text), wanted = normalized(gold);
    const extracted = found ? normalized(found.answer) : INVALID;
    return {closing: found, box, extracted, right: same(extracted, wanted), boxRight: Boolean(box) && same(normalized(box.answer), wanted)};
  }

  return {judge, normalized, same, closing, boxed, INVALID};
})();
