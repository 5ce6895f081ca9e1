# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl check`: examines the configuration and the host, and reports what is wrong."""
