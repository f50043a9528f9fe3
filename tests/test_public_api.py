"""What ``import fasc`` gives."""

import subprocess
import sys

import fasc


def test_all_is_sorted_and_everything_in_it_exists():
    assert list(fasc.__all__) == sorted(fasc.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in fasc.__all__:
        assert getattr(fasc, name) is not None
    assert set(fasc._WHERE) | {"FascError"} == set(fasc.__all__)


def test_importing_is_light_and_registers_the_quantizer_either_way_round():
    light = "import sys, fasc; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    before = "import fasc, transformers; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'fasc' in m"
    after = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; import fasc; assert 'fasc' in m"
    itself = (
        "import fasc.serving.quantizer; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'fasc' in m"
    )
    for script in (light, before, after, itself):
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
