package main

import (
	"time"

	"github.com/vmckpt/vmckpt/test/guest/linux/workload"
)

// startCounter counts. Each count rewrites a part of the buffer and then reads all of it, which must be what that count
// says, and prints the count with the buffer's hash.
func startCounter(g *guest) (func() error, error) {
	c := workload.Counter{GroupPages: g.number("group", 16), Seed: 1}
	c.Pages = g.number("buffer", 16) << 20 / workload.PageBytes / c.GroupPages * c.GroupPages
	step := time.Duration(g.number("step", 100)) * time.Millisecond
	buffer, err := memory(c.Pages * workload.PageBytes)
	if err != nil {
		return nil, err
	}
	c.Fill(buffer)
	hash, err := c.Check(buffer, 0)
	if err != nil {
		return nil, err
	}
	g.counted.Store(&workload.State{Hash: hash, OK: true})
	return func() error {
		next := time.Now()
		for count := uint64(1); ; count++ {
			c.Step(buffer, count)
			hash, err := c.Check(buffer, count)
			if err != nil {
				g.printf("CORRUPT counter: %v", err)
			}
			state := workload.State{Count: count, Hash: hash, OK: err == nil}
			g.counted.Store(&state)
			g.printf("%v", state)
			// Steps that were missed are not made up for: after a restore the clock may have jumped.
			if next = next.Add(step); time.Until(next) < 0 || time.Until(next) > step {
				next = time.Now().Add(step / 10)
			}
			time.Sleep(time.Until(next))
		}
	}, nil
}
