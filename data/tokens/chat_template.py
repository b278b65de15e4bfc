"""Chat templates: a conversation as text, by a program in the Jinja language that comes with a tokenizer.

The environment is that of transformers, so that the same template gives the same text. It is a sandbox: a template
reads the messages and makes text, and reaches nothing else.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from common.errors import DataError
from common.text import one_line, shorten, to_json

TEXT_TEMPLATE = (
    "{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{%- set turns = messages[1:] if system else messages %}"
    "{{- bos_token }}"
    "{%- for turn in turns %}"
    "{%- if turn.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + turn.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + turn.content + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
)
"""The format of a tokenizer that has neither a template nor the tokens [INST] and [/INST]: these are text, as in
Mistral's tokenizer v1. `data.corpora.chat.conversation_text` has the same text without the special tokens."""
TOKEN_TEMPLATE = (
    "{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{%- set turns = messages[1:] if system else messages %}"
    "{%- set last = turns | selectattr('role', 'equalto', 'user') | list | length * 2 - 1 %}"
    "{{- bos_token }}"
    "{%- for turn in turns %}"
    "{%- if turn.role == 'user' %}"
    "{{- '[INST]' + (system if loop.index == last else '') + turn.content + '[/INST]' }}"
    "{%- else %}{{- turn.content + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
)
"""The format of a tokenizer without a template that has the tokens [INST] and [/INST]: Mistral's v2 and v3. The system
message is in the last message of the user, as in mistral-common."""
GENERATION_MARKS = "generation_marks"
"""The variable of a template with the two texts to put around what `{% generation %}` encloses."""


def render(template: str, messages: Sequence[Mapping[str, str]], prompt: bool, variables: Mapping[str, Any]) -> str:
    """Return a conversation as text.

    Args:
        template: the chat template.
        messages: objects with `role` and `content`.
        prompt: end with what comes before an answer, if the template has that (`add_generation_prompt`).
        variables: further variables, such as `bos_token`.

    Raises:
        DataError: the template is not valid, or refuses the conversation.
    """
    given = {"tools": None, "documents": None, GENERATION_MARKS: ("", "")} | dict(variables)
    try:
        return str(_compiled(template).render(messages=messages, add_generation_prompt=prompt, **given))
    except Exception as error:  # A template can fail like any program.
        reason = shorten(one_line(str(error)), 200)
        raise DataError(f"expected a conversation that the chat template takes, found: {reason}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}` of transformers, which encloses what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_enclose", [jinja2.nodes.ContextReference()])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _enclose(self, context: Any, caller: Any) -> str:
            start, stop = context[GENERATION_MARKS]
            return f"{start}{caller()}{stop}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def _refuse(message: str) -> None:
    """Raise an error: how a template refuses a conversation."""
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return `value` as JSON. Jinja's own filter of this name escapes characters for HTML."""
    return to_json(value, ensure_ascii=ensure_ascii, **options)
