# SPDX-License-Identifier: MIT
"""genai's cache of keys and values between answers: tokens are those of a new generator, and fewer are evaluated."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgemoe.errors import BackendError, ExpertReadError
from edgemoe.genai import GenaiModel
from edgemoe.genai_cache import can_outlive
from tests.converters import checkpoints
from tests.converters.onnx_genai import genai_model, generate

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (the extra edgemoe[genai])")

N_NEW = 8
PROMPT, OTHER, LATER = checkpoints.random_tokens(3, 20, seed=11)
FOLDERS = ("our olmoe", "our lfm2moe", "builder gpt-oss", "builder lfm2moe")
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Folder:
    """A folder by who made it and its family."""
    return lambda name: Path(request.getfixturevalue(f"{name.split()[0]}_folders")[name.split()[1]])


@contextlib.contextmanager
def _opened(folder: Path, n_ctx: int = 256) -> Iterator[GenaiModel]:
    with GenaiModel(folder, memory="4GiB", n_ctx=n_ctx, n_threads=1) as model:
        yield model


def _answer(model: GenaiModel, prompt: list[int], n_new: int = N_NEW, temp: float = 0.0) -> tuple[list[int], int, int]:
    """So many tokens of an answer that is broken off then, and the tokens evaluated and reused for its prompt."""
    before = model.stats()
    with contextlib.closing(model.generate(prompt, temp=temp)) as tokens:
        found = list(itertools.islice(tokens, n_new))
    after = model.stats()
    return found, after.prompt_tokens - before.prompt_tokens, after.reused_tokens - before.reused_tokens


@pytest.mark.parametrize("name", FOLDERS)
def test_a_conversation_is_that_of_new_generators(name: str, folder: Folder, genai: Any) -> None:
    """Guards against: the last token of an answer missing from the cache, keys of what was said otherwise, a rewound
    window or convolution, and prompts that are evaluated as a whole again."""
    stock = genai_model(genai, folder(name), None)
    rewinds = name == "our olmoe"
    with _opened(folder(name)) as model:

        def turn(prompt: list[int], n_reused: int, n_new: int = N_NEW) -> list[int]:
            found, n_evaluated, reused = _answer(model, prompt, n_new)
            assert found == generate(genai, stock, prompt, n_new)
            assert (n_evaluated, reused) == (len(prompt) - n_reused, n_reused)
            return prompt + found

        first = turn(PROMPT, 0)
        second = turn(first + OTHER, len(first) - 1)  # the last token of an answer has not been evaluated
        third = turn(second + LATER, len(second) - 1)
        assert len(third) > 80  # gpt-oss's window is full
        turn(third, len(third) - 1)  # nothing but the token that was chosen
        again = turn(third, len(third) - 1 if rewinds else 0)
        assert again[: len(third)] == third
        # Another token than the one that was chosen last: a cache that grows loses one more.
        edited = [*again[:-1], (again[-1] + 1) % 500, *OTHER]
        turn(edited, {"our olmoe": len(again) - 2, "builder gpt-oss": len(again) - 1}.get(name, 0))
        turn(second[:30] + LATER, 30 if rewinds else 0)
        turn(second[:30] + LATER, 30 + len(LATER) - 1 if rewinds else 0)  # the same again
        turn(second[:30], 29 if rewinds else 0)
        turn(second[:30] + third[30:50], 30 if rewinds or name == "builder gpt-oss" else 0, 1)
        later = turn(LATER, 0)
        object.__setattr__(model.folder, "vocab_size", 3 << 20)  # so many logits that a piece has 2 tokens
        turn(later + PROMPT, len(later) - 1)


def test_a_window_that_is_not_full_is_rewound(folder: Folder, genai: Any) -> None:
    """Guards against: the builder's gpt-oss never rewound, or rewound where tokens have left its window."""
    stock = genai_model(genai, folder("builder gpt-oss"), None)
    with _opened(folder("builder gpt-oss")) as model:
        first, *_ = _answer(model, PROMPT)
        prompt = PROMPT + first[:4] + OTHER[:3]
        assert first[4] != OTHER[0]
        found = _answer(model, prompt, 30)
        assert found == (generate(genai, stock, prompt, 30), 3, len(PROMPT) + 4)
        found = _answer(model, PROMPT + OTHER)
        assert found == (generate(genai, stock, PROMPT + OTHER, N_NEW), len(PROMPT + OTHER), 0)


def _ending(source: Path, root: Path, token: int) -> Path:
    """The folder with another token that ends answers."""
    made = root / "ending"
    shutil.copytree(source, made)
    config = json.loads((made / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = token
    (made / "genai_config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("name", FOLDERS)
def test_an_answer_that_the_model_ends(name: str, folder: Folder, genai: Any, tmp_path: Path) -> None:
    """Guards against: a generator that is done for ever; the token that ends an answer taken for one in the cache."""
    plain = generate(genai, genai_model(genai, folder(name), None), PROMPT, N_NEW)
    n = next(n for n in range(2, N_NEW) if plain[n] not in plain[:n])
    ending = _ending(folder(name), tmp_path, plain[n])
    stock = genai_model(genai, ending, None)
    with _opened(ending) as model:
        found, _, _ = _answer(model, PROMPT, 100)
        assert found == plain[: n + 1] and model.is_end(found[-1])
        for end in ([plain[n]], []):
            prompt = PROMPT + plain[:n] + end + OTHER
            expected = generate(genai, stock, prompt, N_NEW)
            found, n_evaluated, _ = _answer(model, prompt)
            assert found[: len(expected)] == expected
            assert n_evaluated == len(end + OTHER) or (not end and "olmoe" not in name)


def test_a_full_context(folder: Folder, genai: Any) -> None:
    """Guards against: a cache that stays full, a prompt that is too long for genai's words or loses the cache."""
    stock = genai_model(genai, folder("our olmoe"), None)
    with _opened(folder("our olmoe"), n_ctx=48) as model:
        found, _, _ = _answer(model, PROMPT, 100)
        assert found == generate(genai, stock, PROMPT, 28)
        for prompt in ([], (PROMPT + found)[:48], PROMPT * 5):
            with pytest.raises(BackendError, match=f"of {len(prompt)} tokens: expected 1 to 47"):
                next(model.generate(prompt, temp=0))
        prompt = (PROMPT + found)[:40]
        assert _answer(model, prompt, 100) == (generate(genai, stock, prompt, 8), 1, 39)


@pytest.mark.parametrize("name", ["our olmoe", "builder lfm2moe"])
def test_sampling(name: str, folder: Folder, genai: Any) -> None:
    """Guards against: samples of a seed that depend on what was said before; a chat that samples without the cache;
    greedy tokens where samples were asked for."""
    model = genai_model(genai, folder(name), None)

    def expected(prompt: list[int], seed: int) -> list[int]:
        options = genai.GeneratorParams(model)
        sampling = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "random_seed": seed}
        options.set_search_options(max_length=len(prompt) + N_NEW, **sampling)
        generator = genai.Generator(model, options)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)][len(prompt) :]

    with _opened(folder(name)) as ours:
        greedy, *_ = _answer(ours, PROMPT)
        first, n_evaluated, _ = _answer(ours, PROMPT + greedy, temp=1.5)
        assert n_evaluated == len(PROMPT + greedy)  # a generator that takes the likeliest token cannot sample
        prompt = PROMPT + greedy + first + OTHER
        second, n_evaluated, _ = _answer(ours, prompt, temp=1.5)
        assert n_evaluated == 1 + len(OTHER)
        samples = {tuple(_answer(ours, prompt + second + LATER[:n], temp=1.5)[0]) for n in range(1, 5)}
        assert len(samples) == 4
        for seed in (3, 4):
            ours.set_seed(seed)
            for asked in (PROMPT, PROMPT + first, PROMPT + first):
                assert _answer(ours, asked, temp=1.5) == (expected(asked, seed), len(asked), 0)
        assert _answer(ours, PROMPT)[0] == greedy


def test_the_cache_is_dropped(folder: Folder, tmp_path: Path) -> None:
    """Guards against: a conversation in memory after it was forgotten; a cache that outlives a read error, a change of
    the budget or the model; an answer that is broken by any of the first two."""
    made = tmp_path / "olmoe"
    shutil.copytree(folder("our olmoe"), made)
    with _opened(made) as model:
        expected, *_ = _answer(model, PROMPT)
        for drop in (model.reset, lambda: model.set_memory("3GiB")):
            assert _answer(model, PROMPT) == (expected, 1, len(PROMPT) - 1)
            assert model._kept is not None
            drop()
            assert model._kept is None
            assert _answer(model, PROMPT) == (expected, len(PROMPT), 0)
            with contextlib.closing(model.generate(PROMPT, temp=0)) as tokens:
                begun = [next(tokens)]
                drop()
                assert begun + list(itertools.islice(tokens, N_NEW - 1)) == expected
        share = model._memory._share
        assert share is not None
        model.set_memory(share.budget.floor_bytes)  # so that experts have to be read
        assert _answer(model, PROMPT)[0] == expected
        os.truncate(made / "experts.bin", 4096)
        with pytest.raises(ExpertReadError, match="expert"):
            _answer(model, PROMPT + expected + OTHER + LATER, 50)
        assert model._kept is None
        shutil.copyfile(folder("our olmoe") / "experts.bin", made / "experts.bin")
        assert _answer(model, PROMPT) == (expected, len(PROMPT), 0)
        tokens = model.generate(PROMPT, temp=0)
        next(tokens)
    tokens.close()
    assert model._kept is None


class _Interrupting:
    """genai's generator, interrupted by the user in one of its calls, before it has an effect or after."""

    def __init__(self, generator: Any, n_calls: int, is_after: bool) -> None:
        self._generator, self._n_calls, self._is_after = generator, n_calls, is_after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._generator, name)
        if name not in ("append_tokens", "generate_next_token", "get_logits"):
            return found

        def call(*arguments: Any) -> Any:
            self._n_calls -= 1
            if self._n_calls == 0 and not self._is_after:
                raise KeyboardInterrupt
            result = found(*arguments)
            if self._n_calls == 0:
                raise KeyboardInterrupt
            return result

        return call


@pytest.mark.parametrize("name", FOLDERS)
def test_what_the_user_interrupts(name: str, folder: Folder, genai: Any) -> None:
    """Guards against: tokens in the cache that nobody knows of, or none where they are thought to be."""
    prompt = PROMPT + OTHER
    with _opened(folder(name)) as model:
        first, *_ = _answer(model, PROMPT)
        second, *_ = _answer(model, PROMPT + first + OTHER)
        expected = generate(genai, genai_model(genai, folder(name), None), prompt, N_NEW)
        for n_calls, is_after in itertools.product((1, 2, 3, 5), (False, True)):
            model.reset()
            _answer(model, PROMPT)
            assert model._kept is not None
            generator = model._kept._generator
            model._kept._generator = _Interrupting(generator, n_calls, is_after)
            with pytest.raises(KeyboardInterrupt):
                _answer(model, PROMPT + first + OTHER)
            model._kept._generator = generator
            # What was interrupted, as if it had not been; or another text.
            if n_calls % 2:
                found, _, n_reused = _answer(model, PROMPT + first + OTHER)
                assert found == second
                assert n_reused >= len(PROMPT) or "olmoe" not in name
            else:
                assert _answer(model, prompt)[0] == expected


def test_answers_at_once(folder: Folder, genai: Any) -> None:
    """Guards against: an answer that goes on with the cache of another one."""
    stock = genai_model(genai, folder("our olmoe"), None)
    with _opened(folder("our olmoe")) as model:
        prompts = (PROMPT, PROMPT + OTHER, LATER)
        answers = [model.generate(prompt, temp=0) for prompt in prompts]
        found = list(zip(*(itertools.islice(answer, N_NEW) for answer in answers), strict=True))
        assert [list(one) for one in zip(*found, strict=True)] == [generate(genai, stock, p, N_NEW) for p in prompts]
        for answer in answers:
            answer.close()
        assert _answer(model, LATER + OTHER)[1:] == (len(OTHER), len(LATER))


def test_models_whose_positions_change_with_the_length() -> None:
    """Guards against: keys that genai has made for a short text in a long one, where it makes them again itself."""
    assert not can_outlive("phimoe", 4097) and can_outlive("phimoe", 4096)
    assert can_outlive("decoder", 32768)
