from doran_serve.live import reload_adapter as reload_adapter
from doran_serve.live import reload_adapter_async as reload_adapter_async
from doran_serve.plugin import register as register
from doran_serve.publish import publish_adapter as publish_adapter
from doran_serve.store import AdapterStore as AdapterStore

__version__: str
