"""Wordings of tasks: families of templates as files, ours, a user's, and those of FLAN."""

from flanmoe.data.templates.flan import FlanTemplates as FlanTemplates
from flanmoe.data.templates.flan import read_flan as read_flan
from flanmoe.data.templates.folder import families as families
from flanmoe.data.templates.folder import load_family as load_family
from flanmoe.data.templates.template import Template as Template
