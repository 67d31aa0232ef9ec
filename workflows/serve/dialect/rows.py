"""Row: one choice of an answer, as the engine is asked for it; ServedModel: what a gateway knows of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dllm_core.checkpoints.bundle_manifest import BundleOutline
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.request import Request
from dllm_core.errors import RequestError
from workflows.serve.config import Limits
from workflows.serve.dialect.fields import DecodingFields


@dataclass(frozen=True)
class ServedModel:
    """A model by its name: tokenizer, room, the decoding that its recipe says. Holds no weights.

    digest: of its bundle, which replicas must have too.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    context: int
    decode: DecodeConfig
    limits: Limits
    created: int
    objective: str

    @classmethod
    def of(cls, name: str, bundle: BundleOutline, decode: DecodeConfig, limits: Limits, created: int) -> "ServedModel":
        """Of a bundle, whose weights replicas look at."""
        said = bundle.manifest
        context, objective = bundle.config.context_length, said.objective.type
        return cls(name, said.digest, bundle.tokenizer(), context, decode, limits, created, objective)

    @property
    def card(self) -> dict[str, object]:
        """What /v1/models says of it."""
        ours = {"objective": self.objective, "context_length": self.context, "chat": self.has_turns}
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "dllm", "dllm": ours}

    @property
    def has_turns(self) -> bool:
        """Whether its tokenizer marks the turns of a conversation."""
        return self.tokenizer.config.chat is not None

    def check_room(self, prompt: int, suffix: int) -> None:
        """Refuse what leaves no position open: no other max_tokens would help."""
        if prompt + suffix >= self.context:
            problem = f"prompt ({prompt}) + suffix ({suffix}) + 1 exceed the context of {self.context} tokens"
            raise RequestError("suffix" if suffix > prompt else "prompt", problem, remedy="shorten it")

    def check(self, request: Request) -> Request:
        """The request, refused where it cannot be decoded, or not in the calls that one may ask for."""
        request.check(self.tokenizer.vocab_size, self.context)
        config, limit = request.config, self.limits.steps
        usual = max(config.block_length, self.decode.steps_per_block)  # a call a token, or what the recipe says
        if config.steps_per_block > usual:
            calls = -(-request.region_length // config.block_length) * config.steps_per_block
            if calls > max(limit, request.num_asked):
                problem = f"asks for {calls} denoiser calls over all blocks, and there may be {limit}"
                raise RequestError("steps_per_block", problem, config.steps_per_block)
        return request


@dataclass(frozen=True)
class Row:
    """request: what is decoded. head, tail: text that is shown around it. end_id: a token that ends the answer too.

    holes: the lengths of an infill's, in turn. is_echoed: the head is the prompt, and may show none of its tokens.
    """

    request: Request
    head: str = ""
    tail: str = ""
    end_id: int | None = None
    holes: tuple[int, ...] = ()
    is_echoed: bool = False


def of_prompt(
    asked: DecodingFields,
    model: ServedModel,
    prompt: tuple[int, ...],
    suffix: tuple[int, ...],
    seeds: Sequence[int],
    constraint: str | None,
) -> list[Request]:
    """A canvas between a prompt and a suffix for each seed, refused where it cannot be decoded.

    All share what they hold, so that they are checked once and little larger than one when they are sent.
    """
    model.check_room(len(prompt), len(suffix))
    first = model.check(
        Request(
            prompt=prompt,
            config=asked.decode_config(model.decode, model.context - len(prompt) - len(suffix)),
            suffix=suffix,
            stop=asked.stops,
            constraint=constraint,
            top_logprobs=asked.wanted_logprobs or 0,
        )
    )
    return [replace(first, seed=seed) for seed in seeds]
