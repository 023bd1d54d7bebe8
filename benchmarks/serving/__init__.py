"""Parts of the serving benchmark: requests, clients, plans of failures, statistics."""
