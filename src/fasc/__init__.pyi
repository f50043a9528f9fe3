from fasc.diagnosis.diagnose import Diagnosis as Diagnosis
from fasc.errors import FascError as FascError
from fasc.evaluation.registry import BENCHMARKS as BENCHMARKS
from fasc.evaluation.registry import benchmark as benchmark
from fasc.evaluation.score import Score as Score
from fasc.layouts import LAYOUTS as LAYOUTS
from fasc.layouts import layout as layout
from fasc.methods import METHODS as METHODS
from fasc.methods import method as method
from fasc.model.load import load_model as load_model
from fasc.planning.plan import Plan as Plan
from fasc.recipe import Recipe as Recipe
from fasc.reporting.page.write import report as report
from fasc.runner import run as run
from fasc.stages.calibrate import collect as collect
from fasc.stages.compress import Compressed as Compressed
from fasc.stages.compress import compress as compress
from fasc.stages.compress import compress_checkpoint as compress_checkpoint
from fasc.stages.diagnose import diagnose as diagnose
from fasc.stages.evaluate import evaluate as evaluate
from fasc.stages.plan import plan as plan
from fasc.statistics.moments import Statistics as Statistics

__version__: str
