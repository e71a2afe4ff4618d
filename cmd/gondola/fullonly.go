package main

// gondola is built twice: whole, and with the tag lean, without the commands below.
// What they are linked with would be in the memory of every machine, as gondola run
// is the machine's process. A lean gondola hands them to gondola-full beside it.
const fullName = "gondola-full"

// fullOnly are these commands with their short descriptions.
var fullOnly = [][2]string{
	{"manager", "Divide the host's memory among the running machines"},
	{"fleet", "Run several machines from one file, supervised"},
	{"top", "Watch what the running machines do, and act on them"},
	{"metrics", "Serve metrics of the running machines for Prometheus"},
	{"db", "Ask the database of what machines did and what was done to them"},
	{"rules", "Set priorities in guests, and allocations, by rules"},
	{"service", "Tell how services are that machines make up"},
	{"sched", "Give the running machines processor, disk and network by what they do"},
	{"sim", "Simulate scheduling policies on a trace of what machines did"},
}
