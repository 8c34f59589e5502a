"""WebShop in pure Python: the shop, its search engine and its reward, matching the original step by step."""
