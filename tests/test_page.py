"""The page that needs nothing: its model answers as PyTorch's does, its statistics are Python's, and anybody can use it."""

import json
import re
import shutil
import subprocess
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import stetholib
from stetholib import claims, leaderboard, significance, statistics
from stetholib.__main__ import main
from stetholib.commands import page as command
from stetholib.commands import reproduce
from stetholib.data.mini import base as mini_base
from stetholib.data.mini import problems, stories
from stetholib.data.prompts import prompt
from stetholib.editing import Edit, TaskVector, edited
from stetholib.errors import UserError
from stetholib.models import answering
from stetholib.models.weights import edit_weights
from stetholib.study import Study
from stetholib.subspace_projection import scalpel

playwright = pytest.importorskip("playwright.sync_api", reason="the page is looked at with Playwright, which is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page with")

VARIANTS = ["base", "full", "full_shrunk", "scalpel", "stethoscope", "stethoscope_matched", "random_1"]
SMALL = {
    "data.train_problems": 4,
    "data.validation_problems": 4,
    "data.feature_problems": 4,
    "data.general_documents": 28,
    "data.test_problems": dict.fromkeys(problems.SUBJECTS, 2),
    "sae.training_tokens": 1024,
    "sae.d_sae": 48,
    "features.matched_minimum": 2,
    "projection.gradient_problems": 1,
    "selection.loss_problems": 1,
    "selection.greedy": False,
    "evaluation.max_new_tokens": 4,
    "evaluation.noise_problems": 3,
    "evaluation.general_documents": 2,
    "evaluation.variants": VARIANTS,
}
EVERY = tuple(range(12))
EDITS = [("raw", (), 1.0), ("raw", EVERY, 1.0), ("raw", (1, 5, 8, 11), 1.3), ("raw", EVERY, 0.45), ("projected", EVERY, 1.0)]
LIMITS = dict(limit=96, stops=["Problem:"])


@pytest.fixture(scope="module")
def study(tmp_path_factory, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_base.tokenizer, "build", lambda: tokens)
        yield Study.open("smoke", SMALL, root=tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def given(study):
    return command.payload(study, study)


@pytest.fixture(scope="module")
def vector(mini):
    """A change of the shipped model that is large enough to be heard."""
    draw = torch.Generator().manual_seed(0)
    return TaskVector({k: 0.08 * w.std() * torch.randn(w.shape, generator=draw) for k, w in edit_weights(mini.model).items()})


@pytest.fixture(scope="module")
def bases():
    draw = torch.Generator().manual_seed(1)
    return {layer: torch.linalg.qr(torch.randn(64, 2, generator=draw, dtype=torch.float64))[0] for layer in EVERY}


@pytest.fixture(scope="module")
def written(given, vector, bases, tmp_path_factory):
    """The page of the toys' tables, with the shipped miniature in it to answer."""
    model = dict(model=command.packed_model(mini_base.FOLDER, vector), limits=LIMITS)
    packed = dict(scalpel={str(layer): command.packed(basis, "f8") for layer, basis in bases.items()})
    path = tmp_path_factory.mktemp("a stick") / command.PAGE
    path.write_text(command.assembled(given | model | packed), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def opened(browser, written):
    """Open the page anew: opened(width=1280, scheme="light"); what it complains of and asks for is kept beside it."""

    def open_one(width=1280, scheme="light"):
        page = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True).new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(written.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    return open_one


@pytest.fixture(scope="module")
def page(opened):
    return opened()


def test_it_opens_from_a_stick_says_nothing_and_asks_for_nothing(page, written):
    assert page.asked == [written.as_uri()] and page.said == []
    text = written.read_text(encoding="utf-8")
    assert len(text.encode()) < command.LARGEST and not re.search(r"(?:src|href|url|import)\s*[=(]\s*[\"']?https?:", text)
    assert page.locator("svg[role=img]").count() == 6 and page.locator("#tests tr").count() == len(VARIANTS) - 1
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.querySelector('title') && s.querySelector('desc'))")
    sentences = page.locator("p[id^=says]").all_inner_texts()
    assert len(sentences) == 5 and not any(
        re.search("NaN|undefined|null|Infinity", one) for one in [*sentences, page.inner_text("main")]
    )


def test_its_tokens_are_the_tokenizers(page, mini):
    texts = [
        prompt(row["problem"]) + " " + row["solution"]
        for row in problems.generate("test", dict.fromkeys(problems.SUBJECTS, 9), 3)
    ]
    texts += [
        *stories.generate(10, 0, "test"),
        "",
        "  a\n\n\tb $x^2$ ÄÖ \\frac{1}{2}\\cdot 007 Problem:\n$. I hope it is correct.",
        "∑ 日本 𝒳!",
    ]
    found = page.evaluate(
        "texts => { const t = new Gemma.Tokenizer(DATA.model.tokenizer); return texts.map(x => t.encode(x)); }", texts
    )
    assert found == [mini.tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize(
    "shape",
    [
        dict(sliding_window=8),
        dict(num_key_value_heads=1, num_attention_heads=4, head_dim=16, final_logit_softcapping=3.0),
        dict(rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    ],
    ids=["a short window", "shared keys and capped scores", "stretched positions"],
)  # fmt: skip
def test_its_forward_pass_is_pytorchs(page, tokens, tmp_path, shape):
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(0)
    config = mini_base.config(layers=6, hidden=32, vocab_size=len(tokens))
    for name, value in shape.items():
        setattr(config, name, value)
    model = Gemma3ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path), tokens.save_pretrained(tmp_path)
    ids = torch.randint(4, len(tokens), (40,)).tolist()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    packed = command.packed_model(tmp_path, TaskVector({k: torch.zeros_like(w) for k, w in edit_weights(model).items()}))
    found = page.evaluate(
        "([m, ids]) => { const r = new Gemma.Reader(m.config, Gemma.unpack(Gemma.numbers(m.weights), m.shapes));"
        "return ids.map(id => [...r.read(id)]); }",
        [packed, ids],
    )
    assert np.abs(np.array(found) - wanted).max() < 2e-4 * np.abs(wanted).max()


def answers_alike(page, mini, vector, bases, count):
    """Answers of the page and of PyTorch under each edit: how many are compared, and those that differ beyond a tie."""
    rows = problems.generate("test", dict.fromkeys(problems.SUBJECTS, -(-count // 7)), 5)[:count]
    asked = {str(at): prompt(row["problem"]) for at, row in enumerate(rows)}
    vectors, odd = {"raw": vector, "projected": scalpel(vector, bases)}, []
    for name, layers, alpha in EDITS:
        with edited(mini.model, Edit(vectors[name], layers, alpha=alpha)):
            known = answering.answer_some(mini, asked, answering.Limits(LIMITS["limit"], 64))
        ours = page.evaluate(
            "([edit, problems]) => { const w = Live.weights(edit); return problems.map(p => Live.complete(w, p)); }",
            [dict(vector=name, layers=list(layers), alpha=alpha), [row["problem"] for row in rows]],
        )
        for one in known:
            found = ours[int(one.problem_id)]
            if found["text"] != one.completion and found["margin"] > 1e-4:
                odd.append((name, layers, alpha, found, one.completion))
    return len(EDITS) * count, odd


def test_its_answers_are_pytorchs_under_five_edits(page, mini, vector, bases):
    count, odd = answers_alike(page, mini, vector, bases, 10)
    assert count == 50 and not odd


@pytest.mark.slow
def test_its_answers_are_pytorchs_under_five_edits_on_fifty_problems(page, mini, vector, bases, covered):
    count, odd = answers_alike(page, mini, vector, bases, 50)
    covered(f"{count} answers of the page are PyTorch's, to the letter")
    assert not odd


def test_an_edit_of_the_page_is_pythons_bit_for_bit(page, mini, vector, bases):
    name, where = "layers.3.mlp.down_proj", (3, "down")
    for source, delta in (("raw", vector.deltas[where]), ("projected", scalpel(vector, bases).deltas[where])):
        found = page.evaluate(f"[...Live.weights({{vector: '{source}', layers: [3], alpha: 0.7}})['{name}']]")
        with edited(mini.model, Edit(TaskVector({where: delta}), (3,), ("down",), alpha=0.7)):
            wanted = edit_weights(mini.model)[where].flatten().numpy().copy()
        assert np.array_equal(np.array(found, np.float32), wanted) if source == "raw" else np.allclose(found, wanted, atol=1e-7)


SAID = [
    r" So it is $\boxed{41}$." + "\nFinal Answer: The final answer is $41$. I hope it is correct.",
    r" It is $\boxed{41}$.",
    "\nFinal Answer: The final answer is $41$.",
    "\nFinal Answer: The final answer is $41$. I hope it is correct.\nFinal Answer: The final answer is $7$. I hope it is correct.",
    "\nFinal Answer: The final answer is $4\n1$. I hope it is correct.",
    *(f"\nFinal Answer: The final answer is ${text}$. I hope it is correct." for text in (
        "1,041", "x = 41", r"41 \text{ dollars}", "41 square units", r"\boxed{41}", "-41", "41.0", "041", r"\frac{82}{2}", r"\frac12",
        r"\frac{1}{2}", "0.5", r"-\frac{1}{2}", r"\frac{-1}{2}", "", "4$1", "5 degrees", "12.50",
    )),
]  # fmt: skip


def test_it_reads_and_judges_answers_as_the_harness_does(page):
    from lm_eval.tasks.minerva_math import utils

    golds = ["41", r"\frac{1}{2}", "1041", "-41", r"-\frac{1}{2}", "12.5"]
    pairs = [(text, gold) for text in SAID for gold in golds]
    found = page.evaluate(
        "pairs => pairs.map(([t, g]) => { const f = Scoring.judge(t, g); return [f.extracted, f.right]; })", pairs
    )
    extracted = [utils.normalize_final_answer(utils.get_unnormalized_answer(text)) for text, _ in pairs]
    assert [one for one, _ in found] == extracted
    wanted = [utils.is_equiv(one, utils.normalize_final_answer(gold)) for one, (_, gold) in zip(extracted, pairs, strict=True)]
    assert [right for _, right in found] == wanted and 0 < sum(wanted) < len(wanted)


def close(found, wanted):
    found, wanted = np.array(found, float), np.array(wanted, float)
    return np.abs(found - wanted).max() < 1e-9


def test_its_statistics_are_pythons(page):
    rng = np.random.default_rng(0)
    cells = [(0, 0, 10), (0, 5, 540), (7, 0, 60), (863, 103, 2940), (60, 60, 120), (1, 0, 1)]
    cells += [(int(g), int(n * rng.random() * 0.3), n) for n in (20, 400, 2940) for g in rng.integers(0, n // 2, 12)]
    for level in (0.001, 0.05, 0.2):
        told = page.evaluate(
            "([cells, level]) => cells.map(([g, l, n]) => [Statistics.mcnemar(g, l), Statistics.harness_z(l, g, n), Statistics.pooled_z(l, g, n),"
            "Statistics.two_sided((g - l) / 9), ...Statistics.score_interval(g, l, n, level), Statistics.minimum_detectable((g + l) / n, n, level),"
            "Statistics.minimum_detectable_unpaired(g / n, n, level)])",
            [[one for one in cells if one[2] > 1], level],
        )
        wanted = [
            (
                statistics.mcnemar(g, lost),
                statistics.harness_z(lost, g, n),
                statistics.pooled_z(lost, g, n),
                statistics.two_sided((g - lost) / 9),
                *statistics.score_interval(g, lost, n, level),
                statistics.minimum_detectable((g + lost) / n, n, level),
                statistics.minimum_detectable_unpaired(g / n, n, level),
            )
            for g, lost, n in cells
            if n > 1
        ]
        assert close(told, wanted)
    p = rng.random(7) ** 3
    assert close(page.evaluate("p => Statistics.holm(p)", p.tolist()), statistics.holm(p))


SHARES = dict(base=0.3, full=0.62, full_shrunk=0.5, scalpel=0.3, stethoscope=0.44, stethoscope_matched=0.27, random_1=0.36)


@pytest.fixture(scope="module")
def answered():
    """Outcomes of seven models on 7 x 90 problems, subject by subject more alike or less."""
    rng, parts = np.random.default_rng(2), []
    subjects = np.repeat(problems.SUBJECTS, 90)
    hard = rng.random(len(subjects))
    for name, share in SHARES.items():
        luck = np.where(rng.random(len(hard)) < 0.8, hard, rng.random(len(hard)))
        lift = np.repeat(np.linspace(-0.1, 0.15, 7), 90) * (name != "base")
        ids = [f"{at}" for at in range(len(hard))]
        right = dict(exact_match=(luck < share + lift).astype(int), math_verify=(luck < share + 0.04 + lift / 2).astype(int))
        parts.append(pd.DataFrame(dict(variant=name, subject=subjects, problem_id=ids, extracted="1") | right))
    return pd.concat(parts, ignore_index=True)


def never():
    raise AssertionError("no rule that is judged here asks for it")


def judged(answered, margins):
    """The ledger of Python on these answers, its other evidence made up."""
    place = pd.DataFrame(
        dict(
            selector=list(claims.CONTRAST_VARIANT.values()),
            draw=0,
            percentile=0.97,
            percentile_low=[0.96, 0.4],
            percentile_high=0.99,
        )
    )

    @cache
    def against(variant, base):
        return significance.measure(answered[answered["variant"].isin([variant, base])], margins, base=base)

    evidence = claims.Evidence(
        split=never, control=never, sets=lambda: place, tells_apart=lambda: True, chosen=lambda: dict(stethoscope=(1,), stethoscope_matched=(2,)),
        against=against, checks=never, carried=lambda: 1.0, rank=2, published_rung=False, level=margins.level,
    )  # fmt: skip
    return claims.ledger(evidence, ("C2", "C4", "C5", "C6", "C7"))


KNOBS = [(0.05, 0.03, 0.05), (0.01, 0.1, 0.12), (0.2, 0.0, 0.02)]


@pytest.fixture(scope="module")
def wanted(answered):
    """Python's rows and ledger by level and margins."""
    found = {}
    for knobs in KNOBS:
        margins = significance.Margins(*knobs, 2000, 7)
        found[knobs] = significance.measure(answered, margins), judged(answered, margins)
    return found


@pytest.fixture(scope="module")
def ledger(page, answered, wanted):
    """Open the page's ledger on these answers; undone by the module's end, since other tests read what is shown only."""
    margins = significance.Margins(*KNOBS[0], 2000, 7)
    by = {metric: {n: command.outcomes(p[metric]) for n, p in answered.groupby("variant")} for metric in significance.METRICS}
    data = dict(outcomes=by, draws=command.drawn(answered, margins), claims=command.records(wanted[KNOBS[0]][1]))
    data |= dict(tells_apart=True, percentile_low=dict(stethoscope=0.96, stethoscope_matched=0.4), same_layers=False, carried=1.0)
    rows = answered[answered["variant"] == "base"][["subject"]].to_dict("records")
    page.evaluate("([data, rows]) => Ledger.open(data, rows)", [data, rows])
    return page


@pytest.mark.parametrize("knobs", KNOBS)
def test_the_ledgers_rows_and_verdicts_are_pythons_at_any_level_and_margin(ledger, wanted, knobs):
    given = dict(level=knobs[0], overall=knobs[1], subject=knobs[2])
    table, verdicts = wanted[knobs]
    for (variant, metric), part in table.set_index(["variant", "metric", "subject"]).groupby(level=[0, 1]):
        found = ledger.evaluate("([v, m, k]) => Ledger.rows(v, m, k)", [variant, metric, given])
        mine = pd.DataFrame(found).T.loc[part.index.get_level_values("subject")]
        assert mine["verdict"].tolist() == part["verdict"].tolist()
        columns = [name for name in mine if name != "verdict"]
        assert set(columns) >= {
            "z",
            "z_pooled",
            "mcnemar_p",
            "mcnemar_p_holm",
            "ci_low",
            "ci_high",
            "mde",
            "difference",
            "margin",
        }
        assert close(mine[columns].astype(float), part[columns].astype(float))
    told = ledger.evaluate("([k, s]) => Ledger.claims(k, s)", [given, "number_theory"])
    assert [one["verdict"] for one in told] == verdicts["verdict"].tolist()
    assert [one["strict"] for one in told] == verdicts["verdict_strict"].tolist()


def test_these_answers_bring_every_verdict(wanted):
    """Or the test above would compare little."""
    words = {word for _, table in wanted.values() for word in (*table["verdict"], *table["verdict_strict"])}
    assert words == {"consistent", "contradicted", "not testable"}
    told = {word for table, _ in wanted.values() for word in table["verdict"]}
    assert told == {"improved", "degraded", "no worse", "inconclusive"}


def test_a_pick_stands_where_the_board_says_and_the_noise_is_the_paired_errors(page, study):
    board = leaderboard.all_sets(study, study.layer_selection.selected_count)
    errors = leaderboard.paired_errors(study, board["layers"].tolist())
    for at, row in enumerate(board.itertuples()):
        found = page.evaluate("layers => Game.standing(layers)", row.layers)
        assert found["share"] == pytest.approx(row.share) and found["loss"] == pytest.approx(row.loss)
        near = (np.abs(board["loss"] - row.loss) <= 2 * errors[at] * (1 + 1e-6)).sum() - 1
        assert found["within"] == pytest.approx(near / (len(board) - 1))


def test_it_is_used_by_keyboard_alone(opened):
    page = opened()

    def reach(selector):
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches('{selector}')"):
                return
        raise AssertionError(f"{selector} is not reached")

    reach("#layers button")
    before = page.locator("#layers button[aria-pressed=true]").count()
    page.keyboard.press("Space")
    assert abs(page.locator("#layers button[aria-pressed=true]").count() - before) == 1
    reach("#alpha")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#alpha-said") != "1.00"
    reach("#ask")
    page.keyboard.press("Enter")
    page.wait_for_selector("#verdict-edited:not(:empty)", timeout=30_000)
    for side in ("base", "edited"):
        assert page.inner_text(f"#answer-{side}").strip() and re.match("Right|Wrong", page.inner_text(f"#verdict-{side}"))
    reach("#picks button")
    page.keyboard.press("Enter")
    assert "beat" in page.inner_text("#score")
    reach("#reveal")
    page.keyboard.press("Enter")
    assert page.locator("#revealed li").count()
    assert not page.said


def test_an_answer_takes_a_second_at_most_and_its_deciding_sentence_is_marked(opened):
    page = opened()
    page.select_option("#subject", "number_theory")
    page.evaluate("Live.state.layers.clear(); Live.update();")
    once = "t => { Live.complete(Live.weights(Live.current()), DATA.problems[0].problem); return performance.now() - t; }"
    spent = min(page.evaluate(f"({once})(performance.now())") for _ in range(5))  # others may be at work beside it
    page.click("#ask")
    page.wait_for_selector("#verdict-edited:not(:empty)", timeout=30_000)
    marked = "".join(page.locator("#answer-base .right, #answer-base .wrong").all_text_contents())
    assert spent < 1000 and page.inner_text("#answer-base") == page.inner_text("#answer-edited")
    assert not marked or "Final Answer" in marked
    assert page.evaluate("Boolean(Scoring.closing(document.getElementById('answer-base').textContent))") == bool(marked)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_axe_finds_nothing_serious(opened, width, scheme):
    page = opened(width, scheme)
    page.click("#picks button")
    page.click("#reveal")
    page.click("#ask")
    page.wait_for_selector("#verdict-edited:not(:empty)", timeout=30_000)
    found = axe.Axe().run(page).response["violations"]
    grave = [(one["id"], one["nodes"][0]["html"][:90]) for one in found if one["impact"] in ("serious", "critical")]
    assert not grave


def test_on_a_phone_nothing_overflows(opened):
    page = opened(390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('.skip') && e.getBoundingClientRect().right > 391)"
    assert page.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []


def test_the_page_is_not_committed_and_the_figures_are():
    ignored = ["git", "check-ignore", "-q", f"figures/mini/{command.PAGE}"]
    assert subprocess.run(ignored, cwd=ROOT).returncode == 0
    assert subprocess.run([*ignored[:-1], "figures/mini/manifest.json"], cwd=ROOT).returncode == 1


def test_a_model_that_no_browser_can_run_is_refused_in_one_line(tmp_path, study):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama")))
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(model=dict(type="BPE"))))
    world = SimpleNamespace(base_folder=tmp_path)
    with pytest.raises(UserError, match=r"page: profile smoke cannot run in a browser \(its model is no Gemma 3"):
        command.check(SimpleNamespace(world=world, profile=study.profile))
    command.check(study)


def test_a_page_that_is_too_large_is_refused(given, monkeypatch):
    monkeypatch.setattr(command, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"page: it would hold .* MiB, more than 12"):
        command.assembled(given)


def test_the_command_writes_the_page_beside_the_figures(study, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STETHOLIB_HOME", str(tmp_path))
    monkeypatch.setattr(reproduce, "set_environment", lambda *environment: None)
    monkeypatch.setattr(command, "payload", lambda *studies: given)
    monkeypatch.setattr(stetholib, "Study", SimpleNamespace(open=lambda *name, **how: study))
    assert main(["page", "--profile", "smoke", "--organism", "smoke"]) == 0
    path = study.workspace.figures / command.PAGE
    assert capsys.readouterr().out == f"{path.stat().st_size / 2**20:.1f} MiB in {path}\n"
    assert path.read_text(encoding="utf-8") == command.assembled(given)


def test_what_is_embedded_cannot_end_the_script(given):
    page = command.assembled(given | dict(profile=given["profile"] | dict(title="<toy>", name="</script><b>")))
    assert "</script><b>" not in page and "<toy>" not in page.split("<style>")[0] and "<\\/script><b>" in page
