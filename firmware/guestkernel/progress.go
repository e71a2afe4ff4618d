package guestkernel

import (
	"bytes"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// Phase is a stage of the way to a kernel.
type Phase string

// The phases in the order in which they come; each may be left out.
const (
	PhaseWait      Phase = "wait"      // for another process that builds
	PhaseInstall   Phase = "install"   // packages
	PhaseUnpack    Phase = "unpack"    // the source
	PhaseConfigure Phase = "configure" // options
	PhaseCompile   Phase = "compile"
	PhaseLink      Phase = "link"
	PhaseStore     Phase = "store" // checksums, move into the cache
)

var phaseText = map[Phase]string{
	PhaseWait:      "waiting for the guest kernel",
	PhaseInstall:   "installing what the guest kernel needs",
	PhaseUnpack:    "unpacking the Linux source",
	PhaseConfigure: "configuring the guest kernel",
	PhaseCompile:   "compiling the guest kernel",
	PhaseLink:      "linking the guest kernel",
	PhaseStore:     "storing the guest kernel",
}

// Event says how far the work is.
type Event struct {
	Phase Phase
	// Percent is the part of the phase that is done, 0 to 100, or -1 if it is
	// not known.
	Percent int
	// Detail is what is being worked on, "" if there is nothing to say.
	Detail string
}

// String is the event as one line for people.
func (e Event) String() string {
	s := phaseText[e.Phase]
	if e.Percent >= 0 {
		s += fmt.Sprintf(" %d%%", e.Percent)
	}
	if e.Detail != "" {
		s += " (" + e.Detail + ")"
	}
	return s
}

// How much there is to do, roughly: steps that make prints for this
// configuration, and blocks of 10 KiB in the source tarball. Used for
// percentages only.
const (
	compileSteps = 1400
	sourceBlocks = 133_000
)

// tailLines is how much of a failed build's output an error shows.
const tailLines = 12

// maxLine bounds what is kept of one line of output.
const maxLine = 1000

// output follows the output of build.sh: it makes events of it and keeps the
// last lines. It is an io.Writer for one goroutine.
type output struct {
	emit  func(Event)
	phase Phase
	steps int
	line  []byte
	tail  []string
}

func (o *output) Write(p []byte) (int, error) {
	n := len(p)
	for {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			break
		}
		o.keep(p[:i])
		o.parse(string(o.line))
		o.line = o.line[:0]
		p = p[i+1:]
	}
	o.keep(p)
	return n, nil
}

func (o *output) keep(p []byte) {
	o.line = append(o.line, p[:min(len(p), maxLine-len(o.line))]...)
}

func (o *output) parse(line string) {
	// tar puts its name before what its checkpoints say.
	if mark, ok := strings.CutPrefix(strings.TrimPrefix(line, "tar: "), "@"); ok {
		name, arg, _ := strings.Cut(mark, " ")
		o.phase = Phase(name)
		e := Event{Phase: o.phase, Percent: -1}
		if o.phase == PhaseUnpack {
			blocks, _ := strconv.Atoi(arg)
			e.Percent = percent(blocks, sourceBlocks)
		}
		o.emit(e)
		return
	}
	if len(o.tail) == tailLines {
		copy(o.tail, o.tail[1:])
		o.tail = o.tail[:tailLines-1]
	}
	o.tail = append(o.tail, line)

	// make's short form: "  CC      kernel/fork.o".
	fields := strings.Fields(line)
	if len(fields) != 2 || !strings.HasPrefix(line, "  ") || o.phase != PhaseCompile && o.phase != PhaseLink {
		return
	}
	o.steps++
	if fields[0] == "LD" && strings.Contains(path.Base(fields[1]), "vmlinux") {
		o.phase = PhaseLink
	}
	e := Event{Phase: o.phase, Percent: -1, Detail: fields[1]}
	if o.phase == PhaseCompile {
		e.Percent = min(99, percent(o.steps, compileSteps))
	}
	o.emit(e)
}

func percent(done, total int) int { return max(0, min(100, done*100/total)) }
