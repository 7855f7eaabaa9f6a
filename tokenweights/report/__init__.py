"""Records, figures and pages of a training run.

While a run trains, `append_metrics` and `append_token_records` write plain JSON lines. Afterwards
`run_report_html` makes one HTML page of them, `trace_page_html` and `token_trace_html` show single
responses, and the `*_figure` functions return matplotlib figures. Figures and the report need the
extra `tokenweights[report]`; records and traces need nothing beyond the library.
"""

from tokenweights.report.comparison import (
    Comparison,
    Effect,
    RecipeResult,
    recipe_comparison,
)
from tokenweights.report.comparison_page import comparison_figure, comparison_html
from tokenweights.report.dynamics import entropy_metrics
from tokenweights.report.figures import (
    attention_map_figure,
    decile_heatmap,
    dispersion_figure,
    dynamics_figure,
    entropy_relation_figure,
    gradient_figure,
    kinds_figure,
    layer_agreement_figure,
    learning_figure,
    quadrant_figure,
    response_figure,
    runs_figure,
    support_figure,
    weights_figure,
)
from tokenweights.report.inspection import inspected_records
from tokenweights.report.page import run_report_html
from tokenweights.report.recipe_runs import RecipeRun, recipe_run_from_directory
from tokenweights.report.records import (
    TokenRecord,
    append_log,
    append_metrics,
    append_token_records,
    read_metrics,
    read_token_records,
    token_records,
)
from tokenweights.report.run_json import write_run_json
from tokenweights.report.runs import Run, run_from_directory
from tokenweights.report.trace import token_trace_html, trace_page_html

__all__ = [
    "Comparison",
    "Effect",
    "RecipeResult",
    "RecipeRun",
    "Run",
    "TokenRecord",
    "append_log",
    "append_metrics",
    "append_token_records",
    "attention_map_figure",
    "comparison_figure",
    "comparison_html",
    "decile_heatmap",
    "dispersion_figure",
    "dynamics_figure",
    "entropy_metrics",
    "entropy_relation_figure",
    "gradient_figure",
    "inspected_records",
    "kinds_figure",
    "layer_agreement_figure",
    "learning_figure",
    "quadrant_figure",
    "read_metrics",
    "read_token_records",
    "recipe_comparison",
    "recipe_run_from_directory",
    "response_figure",
    "run_from_directory",
    "run_report_html",
    "runs_figure",
    "support_figure",
    "token_records",
    "token_trace_html",
    "trace_page_html",
    "weights_figure",
    "write_run_json",
]
