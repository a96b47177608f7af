"""Tasks of lm-eval on a tiny model, against log-likelihoods by a plain loop; what is refused."""

import math
import statistics
import sys
import types

import pytest
import torch

from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.quality.judge import PACKAGE, load_tasks
from mlpmoe.measure.quality.tasks import task_scores
from tests.tiny import byte_tokenizer, tiny_model
from tests.tiny_tasks import EXAMPLE, QUESTIONS, write_tasks

SPECS = [ConversionSpec(keep=4), ConversionSpec(method="contiguous", active=0.25)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# Figures -----------------------------------------------------------------------------------


def log_likelihood(model, context, rest):
    """Of `rest` after `context`, token by token, each in a pass of its own."""
    tokenizer = byte_tokenizer()
    before, whole = tokenizer(context).input_ids, tokenizer(context + rest).input_ids
    assert whole[: len(before)] == before
    total = 0.0
    for at in range(len(before), len(whole)):
        with torch.no_grad():
            logits = model(torch.tensor([whole[:at]])).logits[0, -1].double()
        total += logits.log_softmax(0)[whole[at]].item()
    return total


def right(model, questions, shots=0):
    """Metric -> for each question 1 if the model's choice is the right one, else 0."""
    solved = f"{EXAMPLE['question']} {EXAMPLE['choices'][EXAMPLE['answer']]}\n\n" if shots else ""
    found = {"acc": [], "acc_norm": []}
    for each in questions:
        likely = [
            log_likelihood(model, solved + each["question"], f" {choice}")
            for choice in each["choices"]
        ]
        per_character = [
            value / len(choice) for value, choice in zip(likely, each["choices"], strict=True)
        ]
        for metric, values in (("acc", likely), ("acc_norm", per_character)):
            found[metric].append(float(values.index(max(values)) == each["answer"]))
    return found


def error_of_mean(values):
    return statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize(
    ("spec", "shots", "limit"),
    [(SPECS[0], None, None), (SPECS[1], None, None), (SPECS[0], 1, 9)],
)
def test_accuracies_are_those_of_a_plain_loop(lm_eval, folder, model, spec, shots, limit):
    converted = convert(model, spec)
    found = task_scores(
        model, converted, byte_tokenizer(), ["animals"], folder, limit=limit, shots=shots
    )
    questions = QUESTIONS[:limit]
    of_dense, of_converted = (right(each, questions, shots) for each in (model, converted))
    assert [score.metric for score in found] == ["acc", "acc_norm"]
    for score in found:
        dense, other = of_dense[score.metric], of_converted[score.metric]
        assert (score.task, score.samples) == ("animals", limit or len(QUESTIONS))
        assert score.shots == (shots or 0)
        assert score.share and score.paired
        assert score.dense == pytest.approx(statistics.fmean(dense), abs=1e-12)
        assert score.converted == pytest.approx(statistics.fmean(other), abs=1e-12)
        assert score.dense_stderr == pytest.approx(error_of_mean(dense))
        assert score.converted_stderr == pytest.approx(error_of_mean(other))
        changes = [b - a for a, b in zip(dense, other, strict=True)]
        assert score.difference == pytest.approx(statistics.fmean(changes), abs=1e-12)
        assert score.difference_stderr == pytest.approx(error_of_mean(changes))


def test_the_questions_tell_the_models_apart(model):
    """Else the test before would show nothing."""
    of_each = [right(each, QUESTIONS) for each in (model, *(convert(model, s) for s in SPECS))]
    assert of_each[0] != of_each[1] and of_each[0] != of_each[2]
    assert any(each["acc"] != each["acc_norm"] for each in of_each)


def test_a_metric_that_is_no_share(lm_eval, folder, model):
    """Nor the mean of figures of questions, so that errors are not paired."""
    converted = convert(model, SPECS[0])
    found = task_scores(model, converted, byte_tokenizer(), ["endings"], folder)
    by_metric = {score.metric: score for score in found}
    score = by_metric["perplexity"]
    assert not score.share and not score.paired
    for value, each in ((score.dense, model), (score.converted, converted)):
        likely = [
            log_likelihood(each, q["question"], f" {q['choices'][q['answer']]}") for q in QUESTIONS
        ]
        assert value == pytest.approx(math.exp(-statistics.fmean(likely)), rel=1e-4)
    assert score.difference_stderr == math.hypot(score.dense_stderr, score.converted_stderr)
    assert by_metric["acc"].share and by_metric["acc"].paired


def test_a_group_has_a_score_of_its_own(lm_eval, folder, model):
    converted = convert(model, SPECS[0])
    found = task_scores(model, converted, byte_tokenizer(), ["zoo", "endings"], folder)
    by_name = {(score.task, score.metric): score for score in found}
    group, part = by_name["zoo", "acc"], by_name["animals", "acc"]
    assert {task for task, _ in by_name} == {"zoo", "animals", "more_animals", "endings"}
    assert (group.samples, group.share, group.paired) == (2 * part.samples, True, False)
    assert (group.dense, group.converted) == pytest.approx((part.dense, part.converted))
    assert group.difference_stderr == math.hypot(group.dense_stderr, group.converted_stderr)


def test_one_question_has_no_error(lm_eval, folder, model):
    found = task_scores(model, model, byte_tokenizer(), ["animals"], folder, limit=1)
    for score in found:
        assert (score.difference, score.paired) == (0.0, True)
        assert score.dense_stderr is score.difference_stderr is None


def test_undefined_numbers_are_no_wrong_answers(lm_eval, folder):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight *= 30_000
    model = model.half()
    with pytest.raises(UserError, match="where float16 ends: load it in bfloat16 or float32"):
        task_scores(model, model, byte_tokenizer(), ["animals"], folder, limit=1)
    assert not model._forward_hooks


def test_it_is_quiet_and_leaves_what_it_was_given(lm_eval, folder, model, capfd):
    converted, tokenizer = convert(model, SPECS[0]), byte_tokenizer()
    tokenizer.pad_token = None
    ids = torch.arange(1, 50)[None]
    before = [each(ids).logits for each in (model, converted)]
    told = []
    task_scores(
        model, converted, tokenizer, ["endings"], folder, 4,
        on_progress=lambda message, share: told.append((message, share)),
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert tokenizer.pad_token is None
    for old, each in zip(before, (model, converted), strict=True):
        assert torch.equal(old, each(ids).logits)
    shares = [(0.25, 0.5, 0.75, 1.0)] * 2
    assert told[:2] == [("looking for tasks", None), ("reading the task endings", None)]
    for name, expected in zip(("dense", "converted"), shares, strict=True):
        assert [s for message, s in told if message == f"endings, {name}"] == list(expected)


def test_progress_may_print_and_end_the_work(lm_eval, folder, model, capsys):
    class Enough(Exception):
        pass

    def tell(message, share):
        print(message)
        if share:
            raise Enough

    with pytest.raises(Enough):
        task_scores(model, model, byte_tokenizer(), ["animals"], folder, on_progress=tell)
    assert capsys.readouterr().out.splitlines()[-1] == "animals, dense"


# Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["animals", "fishes"],
            "knows no task 'fishes'; see the list by python -m lm_eval",
        ),
        ([""], "name at least one task"),
        ([], "name at least one task"),
        (["animals", "zoo"], "the task animals is asked for twice, by animals and by zoo"),
        (["animals", "animals"], "asked for twice"),
        (["fetched"], "the data of the task fetched cannot be had: .* needs a network once"),
        (["broken"], "the task broken or its data cannot be read .TemplateSyntaxError"),
    ],
)
def test_tasks_that_cannot_be_had(lm_eval, folder, model, names, words):
    with pytest.raises(UserError, match=words):
        task_scores(model, model, byte_tokenizer(), names, folder, limit=1)


def test_the_list_is_of_the_folder_too(lm_eval, folder):
    with pytest.raises(UserError, match="ls tasks --include_path ") as caught:
        load_tasks(["fishes"], folder)
    assert str(folder) in str(caught.value)


def test_data_that_is_gone(lm_eval, tmp_path):
    write_tasks(tmp_path)
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="the task animals or its data cannot be read"):
        load_tasks(["animals"], tmp_path)


def test_a_folder_that_is_not_there(lm_eval, tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        load_tasks(["animals"], tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"shots": -1}, "shots must be at least 0"),
        ({"shots": 3}, "lm-eval cannot judge animals: ValueError: Sample larger"),  # than 1 example
    ],
)
def test_numbers_that_do_not_fit(lm_eval, folder, model, options, words):
    with pytest.raises(UserError, match=words):
        task_scores(model, model, byte_tokenizer(), ["animals"], folder, **options)


@pytest.mark.parametrize(
    ("flag", "words"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "only tasks of text")]
)
def test_tasks_that_are_not_offered(lm_eval, folder, monkeypatch, flag, words):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, flag, True, raising=False)
    with pytest.raises(UserError, match=words):
        load_tasks(["animals"], folder)


def test_without_lm_eval_it_is_said_what_to_install(monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        load_tasks(["arc_easy"])
    assert str(caught.value) == f'tasks need the package lm-eval: pip install "{PACKAGE}".'


def test_an_lm_eval_without_what_it_needs(monkeypatch):
    class Torn(types.ModuleType):
        def __getattr__(self, name):
            raise ModuleNotFoundError("No module named 'sacrebleu'", name="sacrebleu")

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", Torn("lm_eval.tasks"))
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    with pytest.raises(UserError, match="need the package sacrebleu, which comes with lm-eval"):
        load_tasks(["arc_easy"])


def test_an_old_lm_eval_is_refused(monkeypatch):
    old = types.ModuleType("lm_eval.tasks")
    old.TaskManager = object
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", old)
    with pytest.raises(UserError, match="too old for tasks: pip install"):
        load_tasks(["arc_easy"])


@pytest.mark.slow
def test_the_tasks_that_come_with_lm_eval(lm_eval, monkeypatch):
    """Without a network their names are known, and their data is missed."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lm_eval.tasks.TaskManager.func)
    with pytest.raises(UserError, match="the data of the task arc_easy cannot be had"):
        load_tasks(["arc_easy"])
