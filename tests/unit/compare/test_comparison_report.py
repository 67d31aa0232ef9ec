"""A comparison's tables and page from its figures alone: every figure under its own heading, and none that is none."""

from workflows.compare.report import report_page, table_lines


def likelihood(nelbo: float, standard_error: float | None = 0.1) -> dict:
    return {"nelbo": nelbo, "standard_error": standard_error, "bits_per_byte": 1.5, "estimator": "exact-count"}


def result_of(learning: dict[str, list[tuple[int, dict]] | None]) -> dict:
    """What a comparison without a task found: points are (tokens, likelihood)."""
    models = list(learning)
    share = {"value": 0.5, "standard_error": None, "low": 0.1, "high": 0.9}
    flexibility = {"holes": [], "two_holes": None, "constraint": None, "editing": None}
    losses = [{"tokens": 1e6, "loss": 4.0}, {"tokens": 2e6, "loss": 3.0}]
    return {
        "name": "some",
        "recipe": {
            "models": {m: [] for m in models},
            "context": {"length": 3},
            "flexibility": {"lengths": [1], "regex": "a"},
        },
        "runs": [
            {"model": m, "data": "text", "parameters": 9, "seconds": 1.0, "losses": losses, "corpus_tokens": 5}
            for m in models
        ],
        "learning": {
            model: points and [{"step": 1, "tokens": tokens, "likelihood": told} for tokens, told in points]
            for model, points in learning.items()
        },
        "context": {m: {"both": {"token": share, "by_distance": [{"distance": 1, "accuracy": share}]}} for m in models},
        "generation": {"judge": "a judge", "text": None, "models": dict.fromkeys(models)},
        "flexibility": dict.fromkeys(models, flexibility),
    }


def test_of_one_held_out_document_no_error_is_told_and_the_report_is_written_all_the_same():
    result = result_of({"only": [(1_000_000, likelihood(4.0, None)), (2_000_000, likelihood(3.25, None))]})
    assert "| only | 9 | 1 | 4.000 | 3.250 | 1.500 | exact-count |" in table_lines(result)
    page = report_page(result, "here").decode()
    assert "<b>3.250</b>" in page
    assert page.count("<svg") == 3


def test_models_that_saw_other_numbers_of_tokens_stand_under_their_own():
    """One was trained twice as long, and one keeps more checkpoints from before."""
    result = result_of(
        {
            "short": [(1_000_000, likelihood(5.0)), (2_000_000, likelihood(4.0))],
            "long": [(2_000_000, likelihood(4.5)), (4_000_000, likelihood(3.0))],
            "none": None,
        }
    )
    head, _, *lines = table_lines(result)[2:7]
    assert head.split(" | ")[3:6] == ["1.00M tokens", "2.00M tokens", "4.00M tokens"]
    assert [line.split(" | ")[3:6] for line in lines] == [
        ["5.000 ± 0.100", "4.000 ± 0.100", "–"],
        ["–", "4.500 ± 0.100", "3.000 ± 0.100"],
        ["–", "–", "–"],
    ]
    assert {line.count(" | ") for line in (head, *lines)} == {7}


def test_a_share_without_spread_has_its_interval_and_an_expression_s_bar_begins_no_column():
    result = result_of({"only": [(1_000_000, likelihood(4.0))]})
    result["recipe"]["flexibility"]["regex"] = "[a-z]+|[0-9]"
    all_right = {"value": 1.0, "standard_error": 0.0, "rows": 61, "low": 0.9407, "high": 1.0}
    half = {"value": 0.5, "standard_error": 0.0625, "rows": 61, "low": 0.38, "high": 0.62}
    told = {"untold": {"matches": half, "exact": half}, "told": {"matches": all_right, "exact": all_right}}
    result["flexibility"]["only"] = {**result["flexibility"]["only"], "constraint": told}
    head, rule, line = table_lines(result)[-3:]
    assert head.replace(r"\|", "").count("|") == rule.count("|") == line.count("|")
    assert line.endswith("| 50.0 ± 6.2 % | 50.0 ± 6.2 % | 100.0 % (95 %: 94.1 to 100.0) |")
    assert "[a-z]+|[0-9]" in report_page(result, "here").decode()
