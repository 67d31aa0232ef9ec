"""What gateways have counted is told by any one of them: every series once, and the sums right."""

import pickle

from prometheus_client.parser import text_string_to_metric_families

from workflows.serve.metrics import GatewayMetrics


def count(metrics, answers, refusals):
    for number in range(answers):
        metrics.finished(
            reason="stop", prompt=3, tokens=4 + number, calls=2, canvas=8, seconds=0.3, first=0.1, waited=0.01
        )
    for _ in range(refusals):
        metrics.failed(429)


def families(text):
    found = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in found}) == len(found)
    series = [(one.name, *sorted(one.labels.items())) for family in found for one in family.samples]
    assert len({*series}) == len(series)
    return {family.name: family for family in found}


def total(family, name, **labels):
    return sum(one.value for one in family.samples if one.name == name and labels.items() <= one.labels.items())


def test_any_gateway_tells_what_all_have_counted():
    first, second = GatewayMetrics(), GatewayMetrics()
    count(first, 3, 1)
    count(second, 2, 0)
    first.load([{"running": 2, "waiting": 1, "work": 7}])
    second.load([{"running": 2, "waiting": 1, "work": 7}])
    told = families(first.text([pickle.loads(pickle.dumps(second.counted()))]))
    assert total(told["dllm_request_success"], "dllm_request_success_total", finished_reason="stop") == 5
    assert total(told["dllm_request_errors"], "dllm_request_errors_total", status="429") == 1
    assert total(told["dllm_generation_tokens"], "dllm_generation_tokens_total") == (4 + 5 + 6) + (4 + 5)
    assert total(told["dllm_tokens_per_call"], "dllm_tokens_per_call_bucket", le="2.0") == 2
    assert total(told["dllm_tokens_per_call"], "dllm_tokens_per_call_count") == 5
    assert len({one.labels["gateway"] for one in told["dllm_denoiser_calls"].samples}) == 2
    assert [one.value for one in told["dllm_num_requests_running"].samples] == [2]  # the load is no gateway's own


def test_a_gateway_that_ends_takes_its_own_series_along_and_no_other_falls():
    first, second = GatewayMetrics(), GatewayMetrics()
    count(first, 3, 0)
    count(second, 2, 0)
    with_both = families(first.text([second.counted()]))["dllm_generation_tokens"].samples
    alone = families(first.text())["dllm_generation_tokens"].samples
    assert {(one.name, one.labels["gateway"]): one.value for one in alone}.items() <= {
        (one.name, one.labels["gateway"]): one.value for one in with_both
    }.items()


def test_what_the_asked_one_tells_of_itself_counts_once():
    """It is one of all gateways, and so answers itself too."""
    metrics = GatewayMetrics()
    count(metrics, 3, 0)
    told = families(metrics.text([metrics.counted()]))
    assert total(told["dllm_request_success"], "dllm_request_success_total") == 3
