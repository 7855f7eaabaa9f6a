"""matplotlib figures of runs, responses, support and gradients, from few kinds of panels."""

from tokenweights.report.figures.comparison import runs_figure as runs_figure
from tokenweights.report.figures.gradients import decile_heatmap as decile_heatmap
from tokenweights.report.figures.gradients import dispersion_figure as dispersion_figure
from tokenweights.report.figures.gradients import gradient_figure as gradient_figure
from tokenweights.report.figures.responses import attention_map_figure as attention_map_figure
from tokenweights.report.figures.responses import entropy_relation_figure as entropy_relation_figure
from tokenweights.report.figures.responses import quadrant_figure as quadrant_figure
from tokenweights.report.figures.responses import response_figure as response_figure
from tokenweights.report.figures.support import layer_agreement_figure as layer_agreement_figure
from tokenweights.report.figures.support import support_figure as support_figure
from tokenweights.report.figures.training import dynamics_figure as dynamics_figure
from tokenweights.report.figures.training import kinds_figure as kinds_figure
from tokenweights.report.figures.training import learning_figure as learning_figure
from tokenweights.report.figures.training import weights_figure as weights_figure
