"""Image classifiers with a proof: next to every label a radius, and no change of the image smaller than it changes the label."""

from lipnext._version import __version__ as __version__
from lipnext.core.certificate import Certificate as Certificate
from lipnext.core.classifier import Classifier as Classifier
from lipnext.core.experiment import Experiment as Experiment
from lipnext.runs import load as load
from lipnext.runs import train as train
from lipnext.systems import list_systems as list_systems
