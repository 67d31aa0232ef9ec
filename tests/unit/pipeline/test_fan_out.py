"""What a task ended with is raised where the tasks were asked for, without a cluster."""

from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayTaskError

from dllm_core.errors import DataError
from workflows.fan_out import fan_out


@pytest.mark.parametrize(
    "cause", [DataError("shard", "gone"), OSError(28, "No space left on device"), FileNotFoundError(2, "gone", "/tmp")]
)
def test_an_error_of_ours_or_of_the_system_is_told_without_the_traceback_of_its_task(monkeypatch, cause):
    def failed(ref):
        raise RayTaskError("_call", f"ray::_call() (pid=7)\nTraceback\n{cause}", cause).as_instanceof_cause()

    task = SimpleNamespace(remote=lambda *given: "ref")
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: task)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "wait", lambda refs, num_returns: (refs, []))
    monkeypatch.setattr(ray, "get", failed)
    monkeypatch.setattr(ray, "cancel", lambda ref, force: None)
    with pytest.raises(type(cause)) as caught:
        fan_out(str, [1], workers=1)
    assert str(caught.value) == str(cause)
