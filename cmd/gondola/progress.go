package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// progress shows on standard error what takes longer than a second: one line
// that is rewritten on a terminal, one line a step elsewhere.
type progress struct {
	out   *os.File
	quiet bool
	tty   bool

	mu    sync.Mutex
	start time.Time
	shown bool
	step  string
	last  string
	stop  chan struct{}
}

// showAfter is how long something may take without a word.
const showAfter = time.Second

func newProgress(quiet bool) *progress {
	return &progress{out: os.Stderr, quiet: quiet, tty: term.IsTerminal(int(os.Stderr.Fd())), start: time.Now()}
}

// update says what is being done (step) and how far it is (text, may change
// often).
func (p *progress) update(step, text string) {
	if p.quiet {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop == nil {
		p.stop = make(chan struct{})
		go p.tick(p.stop)
	}
	newStep := step != p.step
	p.step, p.last = step, text
	if p.tty {
		p.draw()
	} else if newStep && time.Since(p.start) >= showAfter {
		p.say()
	}
}

// tick keeps the elapsed time current, and makes a step appear that has been
// going on for longer than showAfter.
func (p *progress) tick(stop <-chan struct{}) {
	t := time.NewTicker(showAfter)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case <-t.C:
			p.mu.Lock()
			if p.tty {
				p.draw()
			} else if !p.shown {
				p.say()
			}
			p.mu.Unlock()
		}
	}
}

func (p *progress) say() {
	p.shown = true
	fmt.Fprintf(p.out, "gondola: %s\n", p.last)
}

func (p *progress) draw() {
	if d := time.Since(p.start); d >= showAfter {
		p.shown = true
		fmt.Fprintf(p.out, "\r\x1b[Kgondola: %s (%ds)", p.last, int(d.Seconds()))
	}
}

// done removes the line. It must come before anything else is printed. The
// progress can be used again after it.
func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop == nil {
		return
	}
	close(p.stop)
	p.stop = nil
	if p.tty && p.shown {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
	p.shown, p.start, p.step = false, time.Now(), ""
}
