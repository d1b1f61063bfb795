"""`distcls completion SHELL`: a script that completes commands, flags and their values.

The script holds all words: it starts no Python while the user types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from distcls.cli import COMMANDS, load_command, run
from distcls.config import Command, positional
from distcls.config.schema import choices
from distcls.files import RECIPES, TEMPLATES

SHELLS = ("bash", "zsh", "fish")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Options of `distcls completion`."""

    shell: Literal["bash", "zsh", "fish"] = positional()
    """The shell: bash, zsh or fish. The script is printed on standard output."""


COMMAND = Command(
    options=CompletionOptions,
    prog="distcls completion",
    about="Print a script by which a shell completes the commands, flags and values of distcls.",
    examples=(
        "distcls completion bash > ~/.local/share/bash-completion/completions/distcls",
        "distcls completion zsh > ~/.zfunc/_distcls   # with `fpath+=~/.zfunc` before compinit",
        "distcls completion fish > ~/.config/fish/completions/distcls.fish",
    ),
)


class Flag(NamedTuple):
    """A flag as the scripts have it."""

    name: str
    """With its hyphens."""
    about: str
    words: tuple[str, ...] = ()
    """The values that its type names, unless it may stand without a value."""
    alone: bool = False
    """Whether it may stand without a value."""
    files: bool = False
    """Whether the value may be a file instead of one of `words`."""


def main(arguments: Sequence[str]) -> None:
    """Parse, print."""
    options = COMMAND.parse(arguments)
    scripts = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}
    print(scripts[options.shell](), end="")


def flags_of(command: str) -> Iterator[Flag]:
    """The flags of a command of `COMMANDS`."""
    described: Command[object] = load_command(command).COMMAND
    for name, leaf, about in described.flags():
        if name == "--config":
            yield Flag(name, about, tuple(RECIPES.paths()), files=True)
        elif leaf is None:
            yield Flag(name, about, alone=True)
        elif leaf.bare is None:
            yield Flag(name, about, choices(leaf.type))
        else:  # what stands after it may be an argument of the command
            yield Flag(name, about, alone=True)


def values() -> Iterator[tuple[str, tuple[str, ...]]]:
    """`COMMAND:FLAG` and the values to complete after it."""
    yield from ((f"{command}:{command}", words) for command, words in argument_words())
    for command in COMMANDS:
        yield from ((f"{command}:{flag.name}", flag.words) for flag in flags_of(command))


def argument_words() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The commands whose argument is one of a few words, and those."""
    yield "completion", SHELLS
    yield "recipes", tuple(RECIPES.paths())
    yield "templates", tuple(TEMPLATES.paths())


def abouts() -> Iterator[tuple[str, str]]:
    """The commands and what they do."""
    yield from ((name, about) for name, (_, about) in COMMANDS.items())
    yield "help", "list a command's options"


def bash_script() -> str:
    """For `source`, or a file in bash-completion's folder."""
    flags = (
        f"        {command}) flags='{' '.join(flag.name for flag in flags_of(command))}' ;;"
        for command in COMMANDS
    )
    after = (f"        {key}) values='{' '.join(words)}' ;;" for key, words in values() if words)
    names = " ".join(name for name, _ in abouts())
    return BASH.format(commands=names, flags="\n".join(flags), values="\n".join(after))


BASH = """\
# bash completion of distcls
_distcls() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
    local command=${{COMP_WORDS[1]}} flags= values=
    # bash splits --flag=value into three words
    if [[ $word == = ]]; then
        word=
    elif [[ $before == = ]]; then
        before=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    COMPREPLY=()
    if ((COMP_CWORD == 1)) || [[ $command == help ]]; then
        COMPREPLY=($(compgen -W '{commands} --help --version' -- "$word"))
        return
    fi
    case $command in
{flags}
    esac
    case $command:$before in
{values}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    else
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    fi
    if [[ $before == --config ]]; then
        local IFS=$'\\n'
        compopt -o filenames 2>/dev/null
        COMPREPLY+=($(compgen -f -- "$word"))
    fi
}}
complete -o default -o bashdefault -F _distcls distcls
"""


def zsh_script() -> str:
    """For a file `_distcls` in a folder of `fpath`, or for `source` after `compinit`."""
    flags = (
        f"        {command}) flags=({_described(each[:2] for each in flags_of(command))}) ;;"
        for command in COMMANDS
    )
    after = (f"        {key}) values=({' '.join(words)}) ;;" for key, words in values() if words)
    return ZSH.format(
        commands=_described(abouts()), flags="\n".join(flags), values="\n".join(after)
    )


ZSH = """\
#compdef distcls
_distcls() {{
    local -a commands flags values
    commands=({commands})
    if ((CURRENT == 2)) || [[ $words[2] == help ]]; then
        _describe command commands
        return
    fi
    case $words[2] in
{flags}
    esac
    local before=$words[CURRENT-1]
    if compset -P 1 '--*='; then
        before=${{IPREFIX%=}}
    fi
    case $words[2]:$before in
{values}
    esac
    if [[ $PREFIX == -* ]]; then
        _describe option flags
        return
    fi
    (($#values)) && compadd -a values
    if (($#values == 0)) || [[ $before == --config ]]; then
        _files
    fi
}}
if [[ $funcstack[1] == _distcls ]]; then
    _distcls "$@"
else
    compdef _distcls distcls
fi
"""


def _described(pairs: Iterable[tuple[str, str]]) -> str:
    return " ".join(_quoted(f"{name}:{about}") for name, about in pairs)


def _quoted(text: str) -> str:
    """In single quotes, which text in them would end."""
    return "'" + text.replace("'", "\u2019") + "'"


def fish_script() -> str:
    """For `source`, or a file in fish's folder of completions."""
    base = "complete -c distcls -n"
    lines = [f"{base} __distcls_is -f -a {name} -d {_quoted(about)}" for name, about in abouts()]
    lines.append(f"{base} '__distcls_is help' -f -a '{' '.join(COMMANDS)}'")
    for command, words in argument_words():
        lines.append(f"{base} '__distcls_is {command}' -f -a '{' '.join(words)}'")
    for command in COMMANDS:
        for flag in flags_of(command):
            value = "" if flag.alone else " -r"
            offered = (
                " -f" * (not flag.files) + f" -a '{' '.join(flag.words)}'" if flag.words else ""
            )
            about = _quoted(flag.about)
            lines.append(
                f"{base} '__distcls_is {command}' -l {flag.name[2:]}{value}{offered} -d {about}"
            )
    return FISH + "\n".join(lines) + "\n"


FISH = """\
# fish completion of distcls
function __distcls_is -d 'whether the command is this one; without an argument, not yet there'
    set -l words (commandline -opc)
    test "$words[2]" = "$argv[1]"
end
"""


if __name__ == "__main__":
    run(main)
