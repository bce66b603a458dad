"""YAML and command line: one parser, types checked, the command line wins, errors in one line."""

import re
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from helpers.checks import fails

from simcse_trainer import InputError
from simcse_trainer.cli import spellings
from simcse_trainer.cli.config import build_parser, config_tokens, parse_arguments
from simcse_trainer.cli.spellings import refuse_option

RECIPES = sorted(ROOT.glob("configs/*.yaml"))


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_yaml_values_get_the_types_of_their_options(config):
    model, data, training = parse_arguments(
        [
            config(
                "learning_rate: 1e-4\nnum_train_epochs: 2\npadding_free: false\n"
                "train_file: [a.csv, 'b c.csv']\nhard_negative_weight: -0.5\nmodel_revision:\n"
                "augmentation: word_deletion\naugmentation_rate: 2e-1\n"
            ),
            "--use_cpu=true",
        ]
    )
    assert training.learning_rate == pytest.approx(1e-4)
    assert training.num_train_epochs == 2.0
    assert training.hard_negative_weight == -0.5
    assert (training.augmentation, training.augmentation_rate) == ("word_deletion", 0.2)
    assert model.padding_free is False
    assert model.model_revision is None
    assert data.train_file == ["a.csv", "b c.csv"]


@pytest.mark.parametrize("form", ["{}", "--config {}", "--config={}"])
def test_a_file_is_taken_with_config_before_it_and_without(config, form):
    path = config("learning_rate: 1e-4\ntemperature: 0.1\n")
    words = form.format(path).split()
    behind = [*words, "--temperature", "0.2", "--use_cpu"]
    *_, training = parse_arguments(behind)
    assert (training.learning_rate, training.temperature) == (1e-4, 0.2)
    if len(behind) > 4 or "=" in form:
        # Where the file stands does not matter: the command line wins.
        *_, training = parse_arguments(["--temperature", "0.2", "--use_cpu", *words])
        assert (training.learning_rate, training.temperature) == (1e-4, 0.2)


def test_the_command_line_wins(config):
    path = config("learning_rate: 1e-4\ntemperature: 0.1\npadding_free: true\n")
    model, _, training = parse_arguments(
        [path, "--learning_rate", "3e-5", "--padding_free", "false", "--use_cpu"]
    )
    assert training.learning_rate == pytest.approx(3e-5)
    assert training.temperature == pytest.approx(0.1)
    assert model.padding_free is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", r"unknown option 'lerning_rate'\. Did you mean 'learning_rate'\?"),
        ("lr: 1", r"run\.yaml: lr is not an option: use learning_rate\."),
        ("lr: 1\ntemp: 2", r"lr is .* use learning_rate\. temp is .* use temperature\.$"),
        ("config: a.yaml", r"run\.yaml: unknown option 'config'"),
        ("learning_rate: fast", r"run\.yaml: --learning_rate: invalid float.*'fast'"),
        ("pooling_mode: median", r"run\.yaml: --pooling_mode: invalid choice: 'median'.*'cls'"),
        ("augmentation: cut", r"--augmentation: invalid choice: 'cut'.*'word_deletion'"),
        ("augmentation_rate: 10%", r"--augmentation_rate: invalid float.*'10%'"),
        ("padding_free: maybe", r"--padding_free.*maybe"),
        ("num_train_epochs: [1, 2]", r"run\.yaml: found a list with '2' where one value belongs"),
        ("temperature: 0", r"temperature is 0\.0; expected more than 0"),
        ("per_device_train_batch_size: 1", r"per_device_train_batch_size is 1; expected 2 or more"),
        ("temperature: 0.1\ntemperature: 0.2", r"line 2.*'temperature' is given twice"),
        ("a: [", r"line 1: not valid YAML"),
        ("- a\n- b", r"expected `option: value` lines, found list"),
        ("", r"found nothing"),
        ("eval_strategy: steps\nload_best_model_at_end: true\nsave_strategy: epoch", r"strategy"),
    ],
)
def test_errors_of_a_file_are_one_line(config, text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_arguments([config(text), "--use_cpu"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temprature", "1"], r"unknown option 'temprature'\. Did you mean 'temperature'\?"),
        (["--temp", "0.1"], r"^--temp is not an option: use --temperature\.$"),
        (
            ["--lr=1e-5", "--epochs", "3", "--use_cpu"],
            r"^--lr is not .*: use --learning_rate\. --epochs is not .*: use --num_train_epochs\.$",
        ),
        (["-Learning-Rate", "1"], r"^-Learning-Rate is not an option: use --learning_rate\.$"),
        (["--config"], r"--config: expected a file behind it"),
        (["--config", "--use_cpu"], r"--config: expected a file behind it"),
        (["a.yaml", "--config=b.yaml"], r"two configuration files, a\.yaml and b\.yaml; pass one"),
        (["--config", "no_such.yaml"], r"no_such\.yaml does not exist"),
        (["--temperature"], r"--temperature: expected one argument"),
        (["no_such.yaml"], r"no_such\.yaml does not exist.*Usage: train_simcse\.py"),
        (["--temperature", "0.1", "stray"], r"'stray' belongs to no option"),
    ],
)
def test_errors_of_the_command_line(argv, message):
    with pytest.raises(InputError, match=message):
        parse_arguments(argv)


def test_a_folder_in_place_of_a_config(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        parse_arguments([str(tmp_path)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_every_key_arrives(recipe: Path):
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    # bf16 is refused where there is no GPU that has it: its being parsed is checked all the same.
    parsed = parse_arguments([str(recipe), "--bf16", "false", "--use_cpu", "true"])
    for key, value in content.items():
        holder = next(part for part in parsed if hasattr(part, key))
        found = getattr(holder, key)
        if key in ("bf16", "report_to"):  # overridden above; "none" becomes an empty list
            continue
        if isinstance(found, list):
            assert found == (value if isinstance(value, list) else [value])
        elif isinstance(found, float):
            assert found == float(value)
        else:
            assert str(found).lower() in (
                str(value).lower(),
                f"{type(found).__name__}.{value}".lower(),
            )


def test_the_recipes_are_those_of_the_paper():
    names = {path.stem for path in RECIPES}
    backbones = ["bert_base", "bert_large", "roberta_base", "roberta_large"]
    expected = {f"{kind}_{name}" for kind in ("unsup", "sup") for name in backbones}
    assert expected | {"quickstart", "sup_klue_roberta_base_ko"} <= names
    for path in RECIPES:
        assert config_tokens(path, build_parser())


OPTIONS = {action.dest for action in build_parser()._actions} - {"help"}


@pytest.mark.parametrize("word", sorted([*spellings._OURS, *spellings._WITHOUT]))
def test_what_an_option_is_called_elsewhere_is_refused_with_its_name_here(word):
    assert word not in OPTIONS
    in_a_file, at_the_command_line = (
        refuse_option(dashes + word, OPTIONS) for dashes in ("", "--")
    )
    assert in_a_file.startswith(f"{word} is not an option: ")
    assert at_the_command_line.startswith(f"--{word} is not an option: ")
    named = re.findall(r"--(\w+)", at_the_command_line.split(": ", 1)[1].split("`")[0])
    assert set(named) <= OPTIONS | {"config"}
    if word in spellings._OURS:
        assert named[0] == spellings._OURS[word]
    assert "--" not in in_a_file.split("`")[0] or "--config" in in_a_file
    assert "{" not in at_the_command_line + in_a_file


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("temp", "temperature"),
        ("pooler_type", "pooling_mode"),
        ("max_length", "max_seq_length"),
        ("model", "model_name_or_path"),
    ],
)
def test_the_names_that_people_type_first(word, option):
    assert refuse_option(f"--{word}", OPTIONS).startswith(
        f"--{word} is not an option: use --{option}"
    )


def test_the_other_names_are_each_of_one_option():
    words = " ".join(spellings._ELSEWHERE.values()).split()
    assert len(words) == len(set(words)) == len(spellings._OURS)
    assert not {*words} & {*spellings._WITHOUT}
    assert {*spellings._BESIDES} <= {*words}
    assert {*spellings._ELSEWHERE} <= OPTIONS | {"config"}


def test_a_misspelled_other_name_leads_to_the_option():
    assert refuse_option("--epochz", OPTIONS).endswith("Did you mean 'num_train_epochs'?")
    assert refuse_option("--qqqq", OPTIONS).endswith("See train_simcse.py --help.")


def test_every_option_has_a_help_text():
    for action in build_parser()._actions:
        assert action.help, action.dest


def test_a_recipe_is_found_by_its_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sup_bert_base", "sup_bert_base.yaml", "configs/sup_bert_base.yaml"):
        model_args, _, args = parse_arguments([name, "--bf16", "false", "--seed", "7"])
        assert model_args.model_name_or_path == "google-bert/bert-base-uncased"
        assert args.seed == 7


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("seed: 5\n", encoding="utf-8")
    assert parse_arguments(["quickstart"])[2].seed == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sup_bert_bse", "nearest: sup_bert_base"),
        ("quikstart.yaml", "nearest: quickstart"),
        ("elsewhere/sup_bert_base.yaml", "nearest: sup_bert_base"),
        ("zzz", "there are mntp_gemma3_270m_lora"),
    ],
)
def test_what_is_no_file_and_no_recipe(name, said):
    fails(lambda: parse_arguments([name]), f"Config file {name} does not exist", said)
