"""What is killed goes on where it stopped, and ends as if nothing had been."""

import pytest

from tests.fuzz.kills import kill_everywhere


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", ["collect", "compress", "evaluate"])
def test_killed_at_any_file_the_same_command_ends_as_undisturbed(verb, tmp_path, model_folder):
    kills = list(kill_everywhere(tmp_path, model_folder, 3, [verb]))
    assert len(kills) >= 2
    assert [kill for kill in kills if not kill.survived] == []
