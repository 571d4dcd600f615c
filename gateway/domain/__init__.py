"""The gateway's rules, pure: nothing here does I/O or knows a transport, a store or a PSP."""
