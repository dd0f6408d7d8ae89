"""Settings: YAML, then the command line; unknown names get a hint."""

import pytest

from recipes.resnet_domainnet import ImageJob
from recipes.run_folder import write_yaml
from recipes.settings import parse, read_settings


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("steps: 7\nlearning_rate: 3e-4\nflip: true\nweights: null\n")
    job = parse(ImageJob, ["--config", str(path), "--steps", "9"])
    assert (job.steps, job.learning_rate, job.flip, job.weights) == (9, 3e-4, True, None)
    assert job.batch_size == ImageJob().batch_size


def test_a_saved_job_reads_back(tmp_path):
    job = ImageJob(routing="tag", seed=3, min_crop=0.5)
    write_yaml(tmp_path / "config.yaml", vars(job))
    assert read_settings(ImageJob, tmp_path / "config.yaml") == job


def test_an_unknown_name_suggests_the_nearest(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("bottleneck_dims: 7\n")
    with pytest.raises(ValueError, match=r"job.yaml: bottleneck_dims \(did you mean bottleneck_dim\?\)"):
        parse(ImageJob, ["--config", str(path)])
    with pytest.raises(ValueError, match=r"the command line: num_expert_count \(did you mean num_experts\?\)"):
        parse(ImageJob, ["--num_expert_count", "3"])


def test_a_file_without_names_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("- steps\n- 7\n")
    with pytest.raises(ValueError, match="holds a list; expected lines of the form name: value"):
        parse(ImageJob, ["--config", str(path)])


def test_a_value_of_the_wrong_type_is_refused(tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text("steps: many\n")
    with pytest.raises(SystemExit):
        parse(ImageJob, ["--config", str(path)])
    assert "--steps: invalid int value: 'many'" in capsys.readouterr().err
