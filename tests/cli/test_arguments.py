"""What Hydra would answer with its grammar or a traceback is one line that says how to write it."""

import pytest
from helpers import command

from intern.cli.arguments import WORDS, check_arguments, command_keys
from intern.errors import UserError

TRAIN = command_keys("train")


def refusal(*arguments, keys=TRAIN):
    with pytest.raises(UserError) as caught:
        check_arguments(arguments, WORDS, keys)
    return str(caught.value)


def test_a_commands_keys_are_those_of_its_file_and_of_the_files_that_it_includes():
    assert {"lora", "experiment", "name", "hydra", "resume"} <= TRAIN
    assert command_keys("preview") > TRAIN and "rows" in command_keys("preview")
    assert {"run_dir", "question", "generation"} <= command_keys("query") and "lora" not in command_keys("query")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experiment", "tiny_cpu"], "--experiment: settings have no dashes: experiment=tiny_cpu"),
        (["--lora.r=8"], "--lora.r=8: settings have no dashes: lora.r=8"),
        (["--name", "first try"], "--name: settings have no dashes: 'name=first try'"),
        (["--name"], "--name: settings have no dashes: name=VALUE"),
        (["--multi"], "--multi: no such option; did you mean --multirun?"),
        (["-x"], "-x: no such option; settings have no dashes, as in name=VALUE"),
        (["name=first", "try"], "try: is not KEY=VALUE; if it belongs to the word before it, quote both: 'name=first try'"),
        (["name=it's", "mine"], "quote both: 'name=it'\"'\"'s mine'"),
        (["tiny_cpu"], "tiny_cpu: is not KEY=VALUE; did you mean experiment=tiny_cpu?"),
        (["qkvo"], "did you mean lora=qkvo?"),
        (["nothing*"], "nothing*: is not KEY=VALUE"),
        (["experimnt", "tiny_cpu"], "experimnt: has no value; write experiment=tiny_cpu"),
        (["lora.r", "16"], "lora.r: has no value; write lora.r=16"),
        (["data.train_file"], "write data.train_file=VALUE"),
        (["=3"], "=3: names no key"),
        (["data.columns={question:", "Frage,", "answer:", "Antwort}"], "quote it as a whole: 'data.columns={question: Frage, answer: Antwort}'"),
        (["lora.r=[1"], "lora.r=[1: a bracket is not closed"),
        (["lora.r==3"], "lora.r==3: the value cannot be read; as a text it is written 'lora.r=\"=3\"'"),
        (["lora.r=8,16"], "lora.r=8,16: gives several values; add --multirun for a run with each of them, or write a list as 'lora.r=[8,16]'"),
        (["+loar=3"], "+loar=3: nothing reads a key of this name; did you mean lora?"),
        (["+foo=3"], "+foo=3: nothing reads a key of this name; the keys are data, "),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_how_to_write_it(arguments, said):
    assert said in refusal("seed=1", *arguments) or said in refusal(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job", "lora.r=8"], ["-c", "job"], ["--info", "lora.r=8"], ["--info", "plugins"], ["--cfg=job"],
        ["--config-dir", "somewhere", "lora.r=8"], ["--multirun", "lora.r=8,16"], ["-m", "lora=qkvo,dora"],
        ["~lora"], ["+trainer.optim_args=x"], ["+lora.use_dora=true"], ["++trainer.seed=3"], ["hydra/launcher=gpus"],
        ["question=What, (really)?", "run_dir=a b"], ["data.train_file=[a.jsonl,b.csv]"], ["data.columns={question: Frage}"],
        ["name=-x"], ["notes="], ["data.system_prompt={[("],
    ],
)  # fmt: skip
def test_what_hydra_reads_is_left_to_it(arguments):
    check_arguments(arguments, WORDS, TRAIN)


def test_a_mistaken_word_is_one_line_and_exit_code_2():
    for arguments in (["--experiment", "tiny_cpu"], ["experimnt=tiny_cpu"], ["name=first", "try"]):
        done = command("intern.train", *arguments, check=False)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "experiment" in done.stderr or "'name=first try'" in done.stderr
