from benchmarks.inference import budget as budget
from surgery.deploy.measure.environment import environment


def row(**changes):
    search = {
        "before": 20.0, "limit": 10.0, "predicted": 9.75, "measured": 9.8, "round_to": 16,
        "trials": [{"predicted": 9.5, "measured": 11.0}, {"predicted": 9.75, "measured": 9.8}],
    }  # fmt: skip
    one = {
        "model": "m", "share": 0.5, "search": search, "search_seconds": 80.4, "macs_ratio": 2.5, "later_ms": 9.9,
        "later": {"too_noisy": None, "results": {"slim": {"threads": 2}}},
        "speedup": {"value": 2.02, "low": 1.98, "high": 2.06},
    }  # fmt: skip
    return {**one, **changes}


def test_each_budget_is_a_row_of_what_was_predicted_and_what_was_measured():
    document = {"command": "x", "environment": environment().to_dict(), "measured": [row()]}
    text = budget.markdown(document)
    assert text.splitlines()[-1] == (
        "| m | 20.00 | 10.00 | 9.50 | 11.00 | 2 | 9.75 | 9.80 | 9.90 | 0.990 | 2.02 (1.98-2.06) | 2.50 | 16 | 80 |"
    )
    header, rule, *_ = text.splitlines()[-3:]
    assert header.count("|") == rule.count("|") == text.splitlines()[-1].count("|")


def test_a_measurement_that_was_too_noisy_says_so():
    later = {"too_noisy": "too noisy: the model", "results": {"slim": {"threads": 2}}}
    document = {"command": "x", "environment": environment().to_dict(), "measured": [row(later=later)]}
    assert "2.02 (1.98-2.06) (too noisy)" in budget.markdown(document)
