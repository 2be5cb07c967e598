"""The bodies of requests: OpenAI's fields, and ours beside them. They travel by `extra_body` in OpenAI's client.

A field of OpenAI's that changes nothing here (`user`, `metadata`, …) is taken and ignored. One that we cannot honour is
refused unless its value asks for nothing. An unknown field is an error. Read next: `answers.py`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from renyi.errors import ConfigError

Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class TextPart(BaseModel):
    """A part of a message's content. Only text can be read here."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat. Other fields of OpenAI's (`name`, …) reach the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(BaseModel):
    type: Literal["text"]


class SamplingBody(_Body):
    """What both kinds of completion take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    # Settings of sampling that OpenAI lacks; other servers name them so, too.
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    # Ours.
    mixture: Literal["sequence", "token", "sampled"] = Field(
        "sequence",
        description="how members are mixed: with running weights, which is exact; with fixed ones; or one member, "
        "drawn by its weight, answers alone, and all rescore its answer",
    )
    members: bool = Field(False, description="whether to say what each member makes of every token")
    withhold: bool = Field(False, description="whether to leave an answer above the folder's threshold unsaid")
    # Of OpenAI's, and honoured only where they ask for nothing.
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    # Of OpenAI's, and without an effect on the answer.
    user: str | None = None

    refused: ClassVar[dict[str, str]] = {
        "frequency_penalty": "Give repetition_penalty instead.",
        "presence_penalty": "Give repetition_penalty instead.",
        "logit_bias": "Leave it out.",
    }

    @model_validator(mode="after")
    def _asks_for_nothing_else(self) -> "SamplingBody":
        for name, hint in self.refused.items():
            if getattr(self, name):
                raise ConfigError("is not supported", where=name, hint=hint)
        if self.stream_options is not None and not self.stream:
            raise ConfigError("goes with stream: true", where="stream_options", hint="Leave one of the two out.")
        if self.withhold and (self.mixture == "sampled" or getattr(self, "echo", False)):
            other = "echo" if getattr(self, "echo", False) else "mixture: sampled"
            raise ConfigError(f"does not go with {other}", where="withhold", hint="Leave one of the two out.")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings, without empty ones."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def settings(self) -> dict[str, Any]:
        """The given settings of sampling, as an engine takes them."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any | None = None
    functions: list[Any] | None = None
    function_call: Any | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Any | None = None
    prediction: Any | None = None
    web_search_options: Any | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    refused: ClassVar[dict[str, str]] = {
        **SamplingBody.refused,
        "tools": "Members answer with text only.",
        "functions": "Members answer with text only.",
        "audio": "Members answer with text only.",
        "prediction": "Leave it out.",
        "web_search_options": "Leave it out.",
    }

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ConfigError("goes with logprobs: true", where="top_logprobs")
        return self


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    refused: ClassVar[dict[str, str]] = {**SamplingBody.refused, "suffix": "Leave it out."}

    @model_validator(mode="after")
    def _best_of_is_n(self) -> "CompletionBody":
        if self.best_of not in (None, 1, self.n):
            raise ConfigError("is not supported", where="best_of", hint="Give n, and choose by mixture_nll.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class ScoreBody(_Body):
    """`POST /v1/score`: rows of any of TRL's forms, such as `prompt` and `completion`, or `messages`."""

    model: str
    rows: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _columns_have_names(self) -> "ScoreBody":
        for number, row in enumerate(self.rows, start=1):
            for name in row:
                if not name.isprintable():  # the library that reads rows fails on such names
                    raise ConfigError(f"has a column {name!r}", where=f"row {number}", hint="Give it another name.")
        return self
