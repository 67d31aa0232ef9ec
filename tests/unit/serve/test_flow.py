"""What the serve verb prints can be copied into a shell as it stands."""

import io
import json
import shlex

from rich.console import Console as RichConsole

from workflows.console import Console
from workflows.serve.config import Example, ServeConfig
from workflows.serve.flow import say_how_to_use


def test_a_prompt_is_shown_as_it_is_and_not_as_markup(small_corpus):
    prompt = "[bold]RED[/bold] :heart: \\[x] [/nothing]"
    console = Console()
    console.rich = RichConsole(file=io.StringIO(), soft_wrap=True)
    recipe = small_corpus.recipe.model_copy(update={"serve": ServeConfig(examples=(Example(prompt=prompt),))})
    say_how_to_use(console, "http://127.0.0.1:8000", "small", recipe)
    command = shlex.split(console.rich.file.getvalue().splitlines()[1])
    assert json.loads(command[-1])["prompt"] == prompt
