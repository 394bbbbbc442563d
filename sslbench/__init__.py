"""sslbench: compare self-supervised visual representation learning methods fairly.

Importing this package changes nothing and imports neither torch nor mlflow. The names a plugin
author needs live in :mod:`sslbench.plugin.api` and :mod:`sslbench.plugin.hooks`.
"""

__version__ = "0.1.0"

#: Version of the plugin contracts in :mod:`sslbench.plugin`. A plugin may declare ``API_VERSION`` in its
#: module; another major version is refused when the plugin is loaded.
API_VERSION = "1.0"
