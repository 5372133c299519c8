"""Which experts each task of an evaluation uses, counted in the passes that score it."""

from flanmoe.evaluation.routing.files import FIGURE_FILE as FIGURE_FILE
from flanmoe.evaluation.routing.files import ROUTING_FILE as ROUTING_FILE
from flanmoe.evaluation.routing.files import write_routing as write_routing
from flanmoe.evaluation.routing.listener import RoutingListener as RoutingListener
from flanmoe.evaluation.routing.report import RoutingReport as RoutingReport
from flanmoe.evaluation.routing.report import routing_report as routing_report
