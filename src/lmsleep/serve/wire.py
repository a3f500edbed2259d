"""What clients send. What a text model cannot do is refused by name, and so is what is not known at all."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmsleep.serve.errors import invalid
from lmsleep.session import Sampling
from lmsleep.text.chat import Message

PLAIN = {"type": "text"}
# Fields of the API that a model of text has no use for, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt": (),
    "reasoning": ({},),
    "reasoning_effort": ("none",),
    "response_format": (PLAIN,),
    "store": (False,),
    "suffix": (),
    "text": tuple(
        {**f, **v} for f in ({}, {"format": {"type": "text"}}) for v in ({}, {"verbosity": "medium"})
    ),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (),
    "truncation": ("disabled", "auto"),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Said about a request, with no effect on the answer.
ABOUT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
}

Count = Annotated[int, Field(ge=1, le=2**31)]


class Sent(BaseModel):
    """What a client sends as JSON."""

    @model_validator(mode="before")
    @classmethod
    def check_text(cls, data: Any) -> Any:
        """Refuse what Python reads as JSON and nobody could be sent: NaN, and halves of surrogate pairs."""
        try:
            json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise ValueError("the body is no JSON in Unicode") from None
        return data


class Body(Sent):
    """A request. Unknown fields are kept, so that they can be refused by name."""

    model_config = ConfigDict(extra="allow")

    def check(self) -> None:
        """Refuse what has a value that this server would have to ignore.

        Raises:
            ApiError: naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in ABOUT:
                continue
            if name not in NEUTRAL:
                raise invalid(f"unknown parameter {name!r}", name, "unknown_parameter")
            if value not in NEUTRAL[name]:
                raise invalid(f"{name} is not supported by a model of text", name, "unsupported_parameter")


class Written(Body):
    """What all requests for an answer have."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None

    def sampling(self) -> Sampling:
        """Return how tokens are drawn; by default as the model says, temperature 1."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature=temperature, top_p=self.top_p or 1.0)


class StreamOptions(BaseModel):
    """Options of a streamed completion."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseStreamOptions(BaseModel):
    """Options of a streamed response; `include_state`, this server's own, tells how far the tokens are."""

    model_config = ConfigDict(extra="forbid")
    include_obfuscation: Literal[False] | None = None
    include_state: bool | None = None


class Part(BaseModel):
    """Part of a message."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """A message of a conversation. What it has beside its text may be there, but must be empty."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[Part] | None = None
    name: str | None = None

    def said(self, param: str) -> Message:
        """Return what a template writes.

        Raises:
            ApiError: as `message`, or for calls of tools and the like.
        """
        for name, value in (self.model_extra or {}).items():
            if value:
                raise invalid(
                    f"{name} is not supported by a model of text", f"{param}.{name}", "unsupported_parameter"
                )
        return message(self.role, self.content, param)


class Many(Written):
    """What chat and completions have in common."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Count | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        if self.stop is None:
            return ()
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > 4:
            raise invalid(f"stop must be 4 texts at most, got {len(stops)}", "stop")
        return stops


class ChatBody(Many):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionBody(Many):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None


class Compaction(BaseModel):
    """An entry of `context_management`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["compaction"]
    compact_threshold: Count | None = None


# Of these a model of text has the odds; of the others there is nothing that could be left out.
ODDS = "message.output_text.logprobs"
Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ConversationName(BaseModel):
    """A conversation, by its id."""

    model_config = ConfigDict(extra="forbid")
    id: str


class ResponseBody(Written):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationName | None = None
    max_output_tokens: Count | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    context_management: list[Compaction] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Include] | None = None
    stream_options: ResponseStreamOptions | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    background: bool | None = None


class CompactBody(Body):
    """POST /v1/responses/compact."""

    model: str
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: None = None


ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def message(role: str, content: Any, param: str) -> Message:
    """Return a message whose content is text, or parts of text.

    Raises:
        ApiError: for anything else.
    """
    if role not in ROLES:
        raise invalid(f"role {role!r} is unknown", param)
    if role in ("tool", "function"):
        raise invalid("tools are not supported by this model", param, "unsupported_parameter")
    if isinstance(content, list):
        texts = []
        for part in content:
            said = part if isinstance(part, dict) else part.model_dump()
            if said.get("type") not in ("text", "input_text", "output_text") or not isinstance(
                said.get("text"), str
            ):
                what = said.get("type")
                raise invalid(
                    f"content of type {what!r} is not supported by a model of text",
                    param,
                    "unsupported_content",
                )
            texts.append(said["text"])
        content = "".join(texts)
    if not isinstance(content, str):
        raise invalid("content must be text", param)
    return Message("system" if role == "developer" else role, content)
