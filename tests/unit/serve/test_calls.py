"""A question that goes to one replica and is answered whole: what is tried again elsewhere, and what is not."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from workflows.serve.calls import scores_of
from workflows.serve.progress import LoopEndedError, NotLoadedError


def told(error):
    return RayTaskError("score", "", error).as_instanceof_cause()


GONE = [
    ActorDiedError(),
    grpc.RpcError("unavailable"),
    asyncio.CancelledError(),
    told(NotLoadedError("m")),
    told(LoopEndedError("the decoding loop has ended")),
    NotLoadedError("m"),  # as they come by gRPC
    LoopEndedError("the decoding loop has ended"),
]


def asked_of(*answers):
    """What is made of these answers of replicas in turn, and how often one was asked."""
    calls = []

    async def score(*asked):
        calls.append(asked)
        answer = answers[len(calls) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def scenario():
        try:
            return await scores_of(SimpleNamespace(score=SimpleNamespace(remote=score)), "m", 7)
        except RayError as error:
            return error

    found = asyncio.run(scenario())
    assert set(calls) == {("m", 7)}
    return found, len(calls)


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_a_score_whose_replica_goes_is_asked_for_elsewhere(error):
    assert asked_of(error, "scores") == ("scores", 2)


def test_a_score_that_fails_is_not_asked_for_again():
    error = told(RuntimeError("a score failed"))
    assert asked_of(error, "scores") == (error, 1)
