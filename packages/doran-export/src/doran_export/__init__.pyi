from doran_export.api import export as export
from doran_export.api import verify as verify
from doran_export.errors import ExportError as ExportError
from doran_export.errors import ProofError as ProofError
from doran_export.errors import UnsupportedModelError as UnsupportedModelError
from doran_export.proof.proof import Proof as Proof
from doran_export.report import ExportReport as ExportReport
from doran_export.runtime.runner import OnnxRunner as OnnxRunner

__version__: str
